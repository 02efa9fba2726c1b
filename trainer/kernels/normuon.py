"""NorMuon of matrices with a side of 128 on its Gram matrix, in Triton: every weight is read and written once.

Each step of Polar Express multiplies X by a polynomial in A = X X^T [k, k] (X^T X for tall matrices), and all of these
commute. So the five steps need A alone: P = a I + b A + c A^2, Q <- P Q, A <- P (P A), and X = Q U at the end; the
plain form reads and writes X five times. Four kernels, W [m, n], k = min(m, n):

    gram      M <- mu M + (1 - mu) G;  U = mu M + (1 - mu) G in bf16;  A = U U^T            14 bytes a weight
    polar     A -> Q / (1.02 ||U||_F + 1e-6), ||U||_F the root of A's trace                 17 products [k, k]
    rows      mean squares of the rows of X = Q U, their v, factors                          2 bytes a weight
    apply     W <- (1 - lr wd) W - factor X, and its bf16 copy                        12 bytes a weight, 10 without copy

Precision. A singular value s of U is s^2 in A, so A, P and Q are held as a sum of two fp16 numbers, 22 bits together,
and a product is three tensor-core products with fp32 sums: as exact as fp32 (error of X on equal U 5e-6 for random
matrices, below 2e-3 for singular values over three decades; bf16 of U alone makes 2e-3 and up to 0.1 there). That is
twice the rate of three tf32 products, whose operands have the same 11 bits. Q enters X = Q U as a sum of two bf16.

A program works on one matrix and no sum depends on the others, so results are the same bits for any batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from trainer.normuon import Piece

# Powers of two that keep both fp16 parts within range: the eigenvalues of A and P A stay below 4.1, of P below 8.2,
# of Q below 989 (the slope at 0), and the low part of A is exact to 2^-37.
SCALE_A, SCALE_P, SCALE_Q = (tl.constexpr(2.0**power) for power in (12, 11, 5))


@dataclass(frozen=True)
class Launch:
    """Block along the long side (apply: and blocks of a program), warps and pipeline stages of each kernel."""

    gram: tuple[int, int, int] = (32, 8, 3)
    polar: tuple[int, int] = (8, 1)
    rows: tuple[int, int, int] = (64, 8, 2)
    apply: tuple[int, int, int, int] = (64, 1, 8, 1)


LAUNCH = Launch()  # runs every shape


def tuned(m: int, n: int) -> Launch:
    """The fastest on an H200 for long sides of 1024 (benchmarks/normuon_kernels.py), LAUNCH for others."""
    if max(m, n) % 1024:
        return LAUNCH
    if m <= n:
        return Launch(gram=(64, 8, 3), rows=(64, 8, 3), apply=(64, 16, 8, 2))
    return Launch(gram=(64, 8, 3), rows=(128, 8, 1), apply=(32, 32, 4, 2))


@triton.jit
def _offsets(first, LONG: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Of a block from `first` along the long side: [K, BLOCK] of a wide matrix, [BLOCK, K] of a tall one."""
    short = tl.arange(0, K)
    along = first + tl.arange(0, BLOCK)
    if WIDE:
        return short[:, None] * LONG + along[None, :]
    else:
        return along[:, None] * K + short[None, :]


@triton.jit
def gram_kernel(
    grad_ptr, momentum_ptr, u_ptr, gram_ptr, grad_scale_ptr, fresh,
    LONG: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    SCALED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Momentum in place, U in bf16, A = U U^T or U^T U in fp32. Grid (matrices,). fresh: 1 - mu."""
    matrix = tl.program_id(0).to(tl.int64)
    grad_ptr += matrix * (LONG * K)
    momentum_ptr += matrix * (LONG * K)
    u_ptr += matrix * (LONG * K)
    scale = 1.0
    if SCALED:
        scale = tl.load(grad_scale_ptr)
    gram = tl.zeros((K, K), dtype=tl.float32)
    for first in tl.range(0, LONG, BLOCK, num_stages=STAGES):
        at = _offsets(first, LONG, K, BLOCK, WIDE)
        grad = tl.load(grad_ptr + at)
        if SCALED:
            grad = grad * scale
        old = tl.load(momentum_ptr + at)
        new = old + fresh * (grad - old)
        tl.store(momentum_ptr + at, new)
        u = (new + fresh * (grad - new)).to(tl.bfloat16)
        tl.store(u_ptr + at, u)
        gram = tl.dot(u, tl.trans(u), gram) if WIDE else tl.dot(tl.trans(u), u, gram)
    short = tl.arange(0, K)
    tl.store(gram_ptr + matrix * (K * K) + short[:, None] * K + short[None, :], gram)


@triton.jit
def _split(x, SCALE: tl.constexpr):
    """x SCALE as a sum of two fp16 numbers."""
    scaled = x * SCALE
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _product(xh, xl, yh, yl, UNSCALE: tl.constexpr):
    """x y in fp32. Small terms first; low times low is below fp32's last bit."""
    out = tl.dot(xl, yh)
    out = tl.dot(xh, yl, out)
    out = tl.dot(xh, yh, out)
    return out * UNSCALE


@triton.jit
def polar_kernel(
    gram_ptr, q_ptr,
    K: tl.constexpr, SAFE: tl.constexpr, TINY: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    """Q [2, K, K], high and low bf16 part, with Q U = polar(U). Grid (matrices,). SAFE: factor on the norm."""
    matrix = tl.program_id(0).to(tl.int64)
    short = tl.arange(0, K)
    at = short[:, None] * K + short[None, :]
    one = (short[:, None] == short[None, :]).to(tl.float32)
    A = tl.load(gram_ptr + matrix * (K * K) + at)
    trace = tl.sum(tl.sum(A * one, axis=1), axis=0)
    inverse = 1.0 / (tl.sqrt(trace) * SAFE + TINY)
    A = (A * inverse) * inverse
    Q = one
    for step in tl.static_range(5):
        ah, al = _split(A, SCALE_A)
        P = _product(ah, al, ah, al, 1.0 / (SCALE_A * SCALE_A))
        P = COEFFICIENTS[3 * step + 2] * P + COEFFICIENTS[3 * step + 1] * A
        P += COEFFICIENTS[3 * step] * one
        ph, pl = _split(P, SCALE_P)
        if step < 4:
            B = _product(ph, pl, ah, al, 1.0 / (SCALE_P * SCALE_A))
            bh, bl = _split(B, SCALE_A)
            A = _product(ph, pl, bh, bl, 1.0 / (SCALE_P * SCALE_A))
        if step == 0:
            Q = P
        else:
            qh, ql = _split(Q, SCALE_Q)
            Q = _product(ph, pl, qh, ql, 1.0 / (SCALE_P * SCALE_Q))
    Q = Q * inverse
    high = Q.to(tl.bfloat16)
    tl.store(q_ptr + matrix * (2 * K * K) + at, high)
    tl.store(q_ptr + matrix * (2 * K * K) + K * K + at, (Q - high.to(tl.float32)).to(tl.bfloat16))


@triton.jit
def _turned(u, qh, ql, WIDE: tl.constexpr):
    """A block of X in fp32."""
    if WIDE:
        return tl.dot(qh, u, tl.dot(ql, u))
    else:
        return tl.dot(u, qh, tl.dot(u, ql))


@triton.jit
def rows_kernel(
    u_ptr, q_ptr, rows_ptr, factor_ptr, ratio_ptr, fresh, eps, scale,
    LONG: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Row mean squares v in place, rsqrt(v + eps), and the number [1] a matrix that keeps X's norm, times `scale`.

    Grid (matrices,). fresh: 1 - beta2.
    """
    matrix = tl.program_id(0).to(tl.int64)
    short = tl.arange(0, K)
    q_at = q_ptr + matrix * (2 * K * K) + short[:, None] * K + short[None, :]
    qh, ql = tl.load(q_at), tl.load(q_at + K * K)
    u_ptr += matrix * (LONG * K)
    square = tl.zeros((K,), dtype=tl.float32)
    before, after = 0.0, 0.0
    for first in tl.range(0, LONG, BLOCK, num_stages=STAGES):
        u = tl.load(u_ptr + _offsets(first, LONG, K, BLOCK, WIDE))
        x = _turned(u, qh, ql, WIDE)
        if WIDE:
            square += tl.sum(x * x, axis=1)
        else:
            row = matrix * LONG + first + tl.arange(0, BLOCK)
            part = tl.sum(x * x, axis=1)
            old = tl.load(rows_ptr + row)
            new = old + fresh * (part / K - old)
            tl.store(rows_ptr + row, new)
            factor = 1.0 / tl.sqrt(new + eps)
            tl.store(factor_ptr + row, factor)
            before += tl.sum(part, axis=0)
            after += tl.sum(part * factor * factor, axis=0)
    if WIDE:
        row = matrix * K + short
        old = tl.load(rows_ptr + row)
        new = old + fresh * (square / LONG - old)
        tl.store(rows_ptr + row, new)
        factor = 1.0 / tl.sqrt(new + eps)
        tl.store(factor_ptr + row, factor)
        before = tl.sum(square, axis=0)
        after = tl.sum(square * factor * factor, axis=0)
    ratio = tl.sqrt(before) / tl.maximum(tl.sqrt(after), 1e-10)
    tl.store(ratio_ptr + matrix, ratio * scale)


@triton.jit
def apply_kernel(
    u_ptr, q_ptr, factor_ptr, ratio_ptr, weight_ptr, copy_ptr, keep,
    LONG: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    SPAN: tl.constexpr, COPIED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """W <- keep W - ratio factor X and its bf16 copy. Grid (matrices, LONG / SPAN). keep: 1 - lr wd."""
    matrix = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * SPAN
    short = tl.arange(0, K)
    q_at = q_ptr + matrix * (2 * K * K) + short[:, None] * K + short[None, :]
    qh, ql = tl.load(q_at), tl.load(q_at + K * K)
    ratio = tl.load(ratio_ptr + matrix)
    u_ptr += matrix * (LONG * K)
    weight_ptr += matrix * (LONG * K)
    if COPIED:
        copy_ptr += matrix * (LONG * K)
    for past in tl.range(0, SPAN, BLOCK, num_stages=STAGES):
        first = start + past
        at = _offsets(first, LONG, K, BLOCK, WIDE)
        x = _turned(tl.load(u_ptr + at), qh, ql, WIDE)
        row = matrix * K + short if WIDE else matrix * LONG + first + tl.arange(0, BLOCK)
        factor = tl.load(factor_ptr + row) * ratio
        weight = tl.load(weight_ptr + at) * keep - x * factor[:, None]
        tl.store(weight_ptr + at, weight)
        if COPIED:
            tl.store(copy_ptr + at, weight.to(tl.bfloat16))


@dataclass(frozen=True)
class Scratch:
    """Of B matrices [m, n]: u_Bmn bf16, gram_Bkk fp32, q_B2kk bf16, factor_Bm and ratio_B fp32."""

    u_Bmn: torch.Tensor
    gram_Bkk: torch.Tensor
    q_B2kk: torch.Tensor
    factor_Bm: torch.Tensor
    ratio_B: torch.Tensor

    @classmethod
    def of(cls, count: int, m: int, n: int, device: torch.device) -> Scratch:
        """Uninitialised."""
        k = min(m, n)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        bf16 = torch.bfloat16
        return cls(
            empty(count, m, n, dtype=bf16),
            empty(count, k, k),
            empty(count, 2, k, k, dtype=bf16),
            empty(count, m),
            empty(count),
        )

    def part(self, start: int, end: int) -> Scratch:
        """Views of matrices start to end."""
        return Scratch(*(tensor[start:end] for tensor in vars(self).values()))


def _sides(m: int, n: int) -> dict[str, Any]:
    return {"LONG": max(m, n), "K": min(m, n), "WIDE": m <= n}


def gram(
    grad_bmn: torch.Tensor,
    momentum_bmn: torch.Tensor,
    scratch: Scratch,
    momentum: float,
    grad_scale: torch.Tensor | None,
    launch: Launch = LAUNCH,
) -> None:
    """Momentum in place; scratch's u and gram. Tensors contiguous, fp32. grad_scale: fp32 [] on the device."""
    b, m, n = grad_bmn.shape
    block, warps, stages = launch.gram
    gram_kernel[(b,)](
        grad_bmn, momentum_bmn, scratch.u_Bmn, scratch.gram_Bkk, grad_scale, 1 - momentum,
        BLOCK=block, SCALED=grad_scale is not None, STAGES=stages, num_warps=warps, **_sides(m, n),
    )  # fmt: skip


def polar(
    scratch: Scratch,
    coefficients: Sequence[Sequence[float]],
    safety: float,
    tiny: float,
    launch: Launch = LAUNCH,
) -> None:
    """Scratch's gram to its q."""
    count, k, _ = scratch.gram_Bkk.shape
    warps, stages = launch.polar
    polar_kernel[(count,)](
        scratch.gram_Bkk, scratch.q_B2kk,
        K=k, SAFE=1 + safety, TINY=tiny, COEFFICIENTS=tuple(x for row in coefficients for x in row),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def rows(
    rows_bm: torch.Tensor,
    scratch: Scratch,
    *,
    beta2: float,
    eps: float,
    lr: float,
    launch: Launch = LAUNCH,
) -> None:
    """Row mean squares in place (fp32, contiguous); scratch's factor and ratio."""
    b, m, n = scratch.u_Bmn.shape
    block, warps, stages = launch.rows
    rows_kernel[(b,)](
        scratch.u_Bmn, scratch.q_B2kk, rows_bm, scratch.factor_Bm, scratch.ratio_B,
        1 - beta2, eps, lr * math.sqrt(max(1.0, m / n)),
        BLOCK=block, STAGES=stages, num_warps=warps, **_sides(m, n),
    )  # fmt: skip


def apply(
    weight_bmn: torch.Tensor,
    copy_bmn: torch.Tensor | None,
    scratch: Scratch,
    keep: float,
    launch: Launch = LAUNCH,
) -> None:
    """The weights in place (fp32, contiguous) and, where given, their copy in bf16. keep: 1 - lr weight_decay."""
    b, m, n = weight_bmn.shape
    block, blocks, warps, stages = launch.apply
    span = block * blocks
    apply_kernel[(b, max(m, n) // span)](
        scratch.u_Bmn, scratch.q_B2kk, scratch.factor_Bm, scratch.ratio_B, weight_bmn, copy_bmn, keep,
        BLOCK=block, SPAN=span, COPIED=copy_bmn is not None, STAGES=stages,
        num_warps=warps, **_sides(m, n),
    )  # fmt: skip


def update_pieces(
    pieces: list[Piece],
    coefficients: Sequence[Sequence[float]],
    safety: float,
    tiny: float,
    *,
    lr: float,
    momentum: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> None:
    """One step on matrices of one shape, min(m, n) = 128 and max(m, n) a multiple of it, fp32 and contiguous.

    Changes weights, their bf16 copies, momenta and row mean squares in place. grad_scale: fp32 [] on the device, times
    which gradients are taken. Temporaries: 2 bytes a weight and 128 KiB a matrix. launch: `tuned` for None.
    """
    m, n = pieces[0].weight.shape[1:]
    launch = tuned(m, n) if launch is None else launch
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece.weight))
    scratch = Scratch.of(ends[-1], m, n, pieces[0].weight.device)
    parts = [scratch.part(start, end) for start, end in pairwise(ends)]
    for piece, part in zip(pieces, parts, strict=True):
        gram(piece.grad, piece.momentum, part, momentum, grad_scale, launch)
    polar(scratch, coefficients, safety, tiny, launch)
    for piece, part in zip(pieces, parts, strict=True):
        rows(piece.rows, part, beta2=beta2, eps=eps, lr=lr, launch=launch)
        apply(piece.weight, piece.copy, part, 1 - lr * weight_decay, launch)
