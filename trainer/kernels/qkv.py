"""Queries, keys and values from their projection, in one Triton kernel forward and one (and a small sum) backward.

    q = turn(norm(q' + bias)), k = turn(norm(k' + bias)), v = sigmoid(l) v' + sigmoid(-l) v_1

with q', k', v' slices of a fused projection (global layers: not turned), or TPA's products of factors
(arXiv 2501.06425, section 3.1); norm: RMSNorm over a head (arXiv 2010.04245); turn: GRAPE-M (arXiv 2512.07805); v_1:
the value residual (arXiv 2410.17897). The same as trainer/megatron/fused_layer.py: fp32 inside, rounded once, v' before
it is mixed. At T = 16384 and the full width the forward pass moves 94 MB, the backward pass 137 MB (TPA, mixed).
Nothing is kept but the inputs: the backward pass computes heads anew (qkv_backward.py). No atomics, so two runs give
the same bits; nothing waits for the device.

Shapes: T tokens, S positions, H query heads, G key-value heads, C head dim, P = C / 2 planes, Y = (H + 2 G) C,
X columns of the projection, M tokens of a program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from common.errors import ConfigError
from trainer.kernels import qkv_backward
from trainer.kernels.qkv_heads import (
    Program,
    QKVShape,
    before_norm,
    head_slot,
    load_factors,
    load_halves,
    load_head,
)

FORWARD = Program(tokens=16, warps=4)


def qkv(
    mixed_TX: torch.Tensor,
    bias_Y: torch.Tensor | None,
    q_norm_C: torch.Tensor,
    k_norm_C: torch.Tensor,
    rotation_2SP: torch.Tensor | None,
    first_value_TGC: torch.Tensor | None,
    logit: torch.Tensor | None,
    *,
    rows: int,
    heads: int,
    groups: int,
    head_dim: int,
    q_rank: int,
    kv_rank: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, H, C], k and v [T, G, C], bf16 contiguous, with gradients of all seven tensors. See the top of this file.

    Token t is row t % rows of position t // rows. q_rank 0: mixed is [T, G, H/G + 2, C] with its bias added, bias_Y
    None. Otherwise mixed holds TPA's factors side by side, [a_query H q_rank | a_key G kv_rank | a_value | b_query
    q_rank C | b_key kv_rank C | b_value], and bias_Y [G, H/G + 2, C] is added to their products.
    rotation_2SP: cos and sin, fp32; None: not turned. first_value_TGC and logit [1] fp32: v_1; None: v is v'.
    mixed, first value bf16; bias and norms bf16 or fp32. Rotated rows at most 64. ConfigError: others.
    """
    shape = QKVShape(rows, heads, groups, head_dim, q_rank, kv_rank, eps)
    inputs = (mixed_TX, bias_Y, q_norm_C, k_norm_C, rotation_2SP, first_value_TGC, logit)
    _check(*inputs, shape=shape)
    return _QKV.apply(*inputs, shape)


def _check(
    mixed_TX: torch.Tensor,
    bias_Y: torch.Tensor | None,
    q_norm_C: torch.Tensor,
    k_norm_C: torch.Tensor,
    rotation_2SP: torch.Tensor | None,
    first_value_TGC: torch.Tensor | None,
    logit: torch.Tensor | None,
    *,
    shape: QKVShape,
) -> None:
    tokens, dim = mixed_TX.shape[0], shape.head_dim
    wanted = {
        "mixed": (mixed_TX, (tokens, shape.mixed_width), torch.bfloat16),
        "bias": (bias_Y, (shape.bias_width,) if shape.q_rank else None, None),
        "q_norm": (q_norm_C, (dim,), None),
        "k_norm": (k_norm_C, (dim,), None),
        "logit": (logit, None if first_value_TGC is None else (1,), torch.float32),
    }
    if rotation_2SP is not None:
        size = (2, tokens // shape.rows, dim // 2)
        wanted["rotation"] = (rotation_2SP, size, torch.float32)
    if first_value_TGC is not None:
        size = (tokens, shape.groups, dim)
        wanted["first_value"] = (first_value_TGC, size, torch.bfloat16)
    for name, (tensor, size, dtype) in wanted.items():
        got = None if tensor is None else tuple(tensor.shape)
        if got != size or (tensor is not None and tensor.dtype != (dtype or tensor.dtype)):
            raise ConfigError(
                f"The kernel of queries, keys and values cannot take this {name}",
                got="None" if tensor is None else f"{got} {tensor.dtype}",
                expected=f"{size} {dtype or ''}",
                remedy="train in bf16, or compute them by another way",
            )
    if (
        tokens == 0
        or tokens % shape.rows
        or shape.heads % shape.groups
        or dim not in (16, 32, 64, 128, 256)
        or (shape.q_rank == 0) != (shape.kv_rank == 0)
    ):
        raise ConfigError(
            "The kernel of queries, keys and values cannot take these sizes",
            got=f"{tokens} tokens, {shape}",
            expected="tokens a multiple of rows, heads of groups, head_dim a power of two in 16 .. 256, both ranks or "
            "none",
            remedy="compute them by another way",
        )


class _QKV(torch.autograd.Function):
    """See qkv."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        *tensors, ctx.shape = arguments
        tensors = [t if t is None else t.contiguous() for t in tensors]
        ctx.save_for_backward(*tensors)
        return forward(*tensors, shape=ctx.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*qkv_backward.gradients(*grads, *ctx.saved_tensors, shape=ctx.shape), None)


def forward(
    mixed_TX: torch.Tensor,
    bias_Y: torch.Tensor | None,
    q_norm_C: torch.Tensor,
    k_norm_C: torch.Tensor,
    rotation_2SP: torch.Tensor | None,
    first_value_TGC: torch.Tensor | None,
    logit: torch.Tensor | None,
    *,
    shape: QKVShape,
    config: Program = FORWARD,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`qkv` without its checks and gradients; contiguous inputs."""
    T, (H, G, C) = len(mixed_TX), shape[1:4]
    query, key, value = (mixed_TX.new_empty(T, n, C) for n in (H, G, G))
    _forward_kernel[(triton.cdiv(T, config.tokens),)](
        *(mixed_TX, bias_Y, q_norm_C, k_norm_C, rotation_2SP, first_value_TGC, logit),
        *(query, key, value, T, shape.rows, shape.eps),
        *(shape.mixed_width, H, G, C // 2, shape.q_rank, shape.kv_rank, *shape.offsets()),
        *(rotation_2SP is not None, logit is not None, config.tokens),
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    return query, key, value


@triton.jit
def _forward_kernel(
    mixed, bias, q_norm, k_norm, rotation, first_value, logit, query, key, value, T, rows, eps,
    X: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, RQ: tl.constexpr,
    R: tl.constexpr, AQ: tl.constexpr, AK: tl.constexpr, AV: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, ROTATED: tl.constexpr, MIXES: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    valid, p = t < T, tl.arange(0, P)[None, :]
    # The last token again where there is none: loads need no mask.
    token = tl.minimum(t, T - 1).to(tl.int64)
    x = mixed + token * X
    cos, sin = 0.0, 0.0
    if ROTATED:
        turn = rotation + token // rows * P + p
        cos, sin = tl.load(turn), tl.load(turn + T // rows * P)
    _normed(
        *(x, bias, q_norm, query + token * (H * 2 * P), valid, cos, sin, eps),
        *(H, H // G, 0, H // G + 2, AQ, BQ, RQ, P, ROTATED),
    )
    _normed(
        *(x, bias, k_norm, key + token * (G * 2 * P), valid, cos, sin, eps),
        *(G, 1, H // G, H // G + 2, AK, BK, R, P, ROTATED),
    )
    lefts, rights = load_factors(x, BV, R, P)
    for g in range(G):
        slot = g * (H // G + 2) + H // G + 1
        held = load_head(x, bias, AV + g * R, slot, R, P)
        left, right = before_norm(held, lefts, rights, R)
        at = token * (G * 2 * P) + g * 2 * P + p
        if MIXES:
            own, other = tl.sigmoid(tl.load(logit)), tl.sigmoid(-tl.load(logit))
            kind = value.dtype.element_ty
            other_left, other_right = load_halves(first_value + at, P)
            left = own * left.to(kind).to(tl.float32) + other * other_left
            right = own * right.to(kind).to(tl.float32) + other * other_right
        tl.store(value + at, left.to(value.dtype.element_ty), mask=valid)
        tl.store(value + at + P, right.to(value.dtype.element_ty), mask=valid)


@triton.jit
def _normed(
    x,
    bias,
    weight,
    out,
    valid,
    cos,
    sin,
    eps,
    HEADS: tl.constexpr,
    PER: tl.constexpr,
    FIRST: tl.constexpr,
    SLOTS: tl.constexpr,
    A_AT: tl.constexpr,
    B_AT: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    ROTATED: tl.constexpr,
):
    # Queries or keys of M tokens: PER heads a group of SLOTS heads, from its head FIRST on.
    p = tl.arange(0, P)[None, :]
    lefts, rights = load_factors(x, B_AT, R, P)
    w_left, w_right = load_halves(tl.broadcast_to(weight, x.shape) + p, P)
    ahead = load_head(x, bias, A_AT, FIRST, R, P)
    for h in range(HEADS):
        held, following = ahead, tl.minimum(h + 1, HEADS - 1)
        slot = head_slot(following, PER, FIRST, SLOTS)
        ahead = load_head(x, bias, A_AT + following * R, slot, R, P)
        left, right = before_norm(held, lefts, rights, R)
        square = tl.sum(left * left + right * right, axis=1, keep_dims=True)
        scale = tl.rsqrt(square * (0.5 / P) + eps)
        left *= scale * w_left
        right *= scale * w_right
        if ROTATED:
            turned = left * cos - right * sin
            right = right * cos + left * sin
            left = turned
        at = out + h * 2 * P + p
        tl.store(at, left.to(out.dtype.element_ty), mask=valid)
        tl.store(at + P, right.to(out.dtype.element_ty), mask=valid)
