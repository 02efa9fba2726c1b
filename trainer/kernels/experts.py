"""Routed experts, forward and backward, as Triton kernels that gather rows by themselves: bf16 products, fp32 sums.

    out_t = bases_t + sum_k gate_tk (W2_e relu(W1_e x_t + b1_e)^2 + b2_e),  e the expert of slot k

Forward, at T = 32768, K = 4, D = 1024, F = 128: `up` reads the rows of x by index (268 MB, of which 67 MB are
different) and writes z = W1 x + b1 (34 MB), `down` forms gate * relu(z)^2 while it loads z and writes y_ND (268 MB),
`sum_slots` adds a token's slots and the bases. Only z is kept for the backward pass (experts_backward.py): neither
gathered rows nor relu(z)^2. The gate enters as gate * relu(z)^2, multiplied in fp32 and rounded once, and times b2 in
fp32. Every sum has a fixed order and there are no atomics: two runs give the same bits. Nothing waits for the device.

Shapes: T tokens, K slots of each, N = T K slots sorted by expert, E experts, D hidden size, F expert width, L tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from common.errors import ConfigError
from trainer.kernels import experts_backward as backward_kernels
from trainer.kernels import experts_outer
from trainer.kernels.dispatch import (
    Slots,
    TileMaps,
    into_registers,
    known_tiles,
    sum_slots,
    tile_rows,
)
from trainer.kernels.norm import Unsummed

# [T, D] from rows_ND, place_TK and held_1 of Slots.
Send = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class UpConfig(NamedTuple):
    """Rows of a tile, columns of D a step, warps, stages of the pipeline."""

    rows: int
    step: int
    warps: int
    stages: int


class DownConfig(NamedTuple):
    """Rows of a tile, columns of D a step, programs that share a tile's columns, warps, stages."""

    rows: int
    cols: int
    split: int
    warps: int
    stages: int


UP = UpConfig(rows=128, step=64, warps=4, stages=3)
DOWN = DownConfig(rows=64, cols=64, split=1, warps=4, stages=3)


def fused_experts(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    slots: Slots,
    bases_TD: Sequence[torch.Tensor],
    fc1_EFD: torch.Tensor,
    bias1_EF: torch.Tensor,
    fc2_EDF: torch.Tensor,
    bias2_ED: torch.Tensor,
    sums: Sequence[torch.Tensor] | None = None,
    unsummed: Unsummed | None = None,
    send: Send | None = None,
) -> torch.Tensor:
    """[T, D] bf16: see the top of this file; with gradients of x, gates, bases and the four weights.

    bases: none to three [T, D], bf16 as x and the weights are; gates fp32. T may be 0: the weights' gradients are
    then zeros. D a multiple of 16, F a power of two in 16 .. 256. sums: contiguous fp32 tensors of the weights' shapes
    to which the backward pass adds their gradients, unrounded; the weights themselves then get none. unsummed: what
    takes the gradients of x by slots, T above 0; x itself then gets none. Of slots of experts elsewhere nothing is
    added, and their gates get zeros. send: makes the sum over slots in place of `sum_slots`, without bases, T above 0.
    ConfigError: another shape or dtype.
    """
    _check(x_TD, gates_TK, fc1_EFD, bias1_EF, fc2_EDF, bias2_ED)
    weights = (fc1_EFD, bias1_EF, fc2_EDF, bias2_ED)
    others = (*weights, sums, unsummed, send, *slots)
    return _FusedExperts.apply(x_TD, gates_TK, len(bases_TD), *bases_TD, *others)


def _check(x_TD: torch.Tensor, gates_TK: torch.Tensor, *weights: torch.Tensor) -> None:
    dtypes = [t.dtype for t in (x_TD, gates_TK, *weights)]
    if dtypes != [torch.bfloat16, torch.float32, *[torch.bfloat16] * 4]:
        raise ConfigError(
            "The expert kernels cannot take these dtypes of rows, gates and weights",
            got=dtypes,
            expected="bfloat16, gates float32",
            remedy="train in bf16, or compute the experts by another way",
        )
    width, hidden = weights[0].shape[1:]
    if width not in (16, 32, 64, 128, 256) or hidden % 16:
        raise ConfigError(
            "The expert kernels cannot take these widths",
            got=f"expert width {width}, hidden size {hidden}",
            expected="a power of two in 16 .. 256, and a multiple of 16",
            remedy="compute the experts by another way",
        )


class _FusedExperts(torch.autograd.Function):
    """See fused_experts."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        num_bases: int,
        *rest: Any,
    ) -> torch.Tensor:
        bases_TD, weights = rest[:num_bases], [w.contiguous() for w in rest[num_bases:][:4]]
        sums, ctx.unsummed, send, *slots = rest[num_bases + 4 :]
        x_TD, gates_TK, of = x_TD.contiguous(), gates_TK.contiguous(), Slots(*slots)
        ctx.num_bases, ctx.tiles, ctx.sums = num_bases, {}, sums
        if x_TD.shape[0] == 0:
            z_NF, out_TD = None, torch.zeros_like(x_TD)
        else:
            z_NF = up(x_TD, of, *weights[:2], known=ctx.tiles)
            y_ND = down(z_NF, gates_TK, of, *weights[2:], known=ctx.tiles)
            out_TD = (
                sum_slots(y_ND, of.place_TK, bases_TD, held_1=of.held_1)
                if send is None
                else send(y_ND, of.place_TK, of.held_1)
            )
        ctx.save_for_backward(x_TD, gates_TK, z_NF, *weights, *slots)
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, gates_TK, z_NF, *rest = ctx.saved_tensors
        weights, slots = rest[:4], Slots(*rest[4:])
        sums = [torch.zeros_like(w) for w in weights] if ctx.sums is None else ctx.sums
        if z_NF is None:
            x_grad, gates_grad = torch.zeros_like(x_TD), torch.zeros_like(gates_TK)
        else:
            fc1_EFD, _, *of_second = weights
            grad_TD = grad_TD.contiguous()
            gates_grad, *states = backward_kernels.inner(
                grad_TD, gates_TK, z_NF, slots, *of_second, known=ctx.tiles
            )
            rows_ND = backward_kernels.rows(states[0], slots, fc1_EFD, known=ctx.tiles)
            if ctx.unsummed is None:
                x_grad = sum_slots(rows_ND, slots.place_TK, held_1=slots.held_1)
            else:  # which may send them, while the weights' gradients are made
                x_grad = None
                ctx.unsummed.leave(rows_ND, slots.place_TK, gates_grad, slots.held_1)
            experts_outer.weight_gradients(
                grad_TD, x_TD, tuple(states), slots, sums, add=ctx.sums is not None
            )
        base_grads = [grad_TD] * ctx.num_bases
        weight_grads = sums if ctx.sums is None else [None] * 4
        of_weights = (*weight_grads, None, None, None)
        return (x_grad, gates_grad, None, *base_grads, *of_weights, *[None] * len(slots))


def up(
    x_TD: torch.Tensor,
    slots: Slots,
    fc1_EFD: torch.Tensor,
    bias1_EF: torch.Tensor,
    config: UpConfig = UP,
    known: TileMaps | None = None,
) -> torch.Tensor:
    """z_NF bf16: W1 x + b1 of the row of each slot's token, in the order of slots."""
    (_, F, D), N, K = fc1_EFD.shape, slots.order_N.numel(), slots.place_TK.shape[1]
    z_NF = x_TD.new_empty(N, F)
    expert_L, start_L = known_tiles(slots, config.rows, known)
    _up_kernel[(expert_L.numel(),)](
        *(x_TD, fc1_EFD, bias1_EF, slots.order_N, slots.ends_E, expert_L, start_L, z_NF),
        *(K, D, F, config.rows, math.gcd(config.step, D)),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return z_NF


@triton.jit
def _up_kernel(
    x,
    weight,
    bias,
    order,
    ends,
    tile_expert,
    tile_start,
    z,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    n, held = tile_rows(tile_start, ends, tile, expert, BLOCK_M)
    token = tl.load(order + held) // K
    f, d = tl.arange(0, F), tl.arange(0, BLOCK_D)
    x_rows = x + token.to(tl.int64)[:, None] * D + d[None, :]
    w_cols = weight + expert.to(tl.int64) * F * D + f[None, :] * D + d[:, None]
    total = tl.zeros((BLOCK_M, F), tl.float32)
    for first in range(0, D, BLOCK_D):
        total = tl.dot(tl.load(x_rows + first), tl.load(w_cols + first), total)
    total += tl.load(bias + expert * F + f).to(tl.float32)[None, :]
    place = z + n.to(tl.int64)[:, None] * F + f[None, :]
    tl.store(place, total.to(z.dtype.element_ty), mask=(n == held)[:, None])


def down(
    z_NF: torch.Tensor,
    gates_TK: torch.Tensor,
    slots: Slots,
    fc2_EDF: torch.Tensor,
    bias2_ED: torch.Tensor,
    config: DownConfig = DOWN,
    known: TileMaps | None = None,
) -> torch.Tensor:
    """y_ND bf16: gate * (W2 relu(z)^2 + b2) of each slot, in the order of slots."""
    (_, D, F), N = fc2_EDF.shape, z_NF.shape[0]
    y_ND = z_NF.new_empty(N, D)
    expert_L, start_L = known_tiles(slots, config.rows, known)
    cols = math.gcd(config.cols, D)
    split = math.gcd(config.split, D // cols)
    _down_kernel[(expert_L.numel() * split,)](
        *(z_NF, gates_TK, fc2_EDF, bias2_ED, slots.order_N, slots.ends_E, expert_L, start_L, y_ND),
        *(split, D, F, config.rows, cols),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y_ND


@triton.jit
def _down_kernel(
    z,
    gates,
    weight,
    bias,
    order,
    ends,
    tile_expert,
    tile_start,
    y,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Programs of one tile follow each other: they read the same rows of z.
    tile = tl.program_id(0) // SPLIT
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    n, held = tile_rows(tile_start, ends, tile, expert, BLOCK_M)
    gate = tl.load(gates + tl.load(order + held))
    f, d = tl.arange(0, F), tl.arange(0, BLOCK_D)
    z_tile = into_registers(tl.load(z + held.to(tl.int64)[:, None] * F + f[None, :]))
    positive = tl.maximum(z_tile, 0.0)
    h = (positive * positive * gate[:, None]).to(z.dtype.element_ty)
    w_cols = weight + expert * D * F + d[None, :] * F + f[:, None]
    places = y + n.to(tl.int64)[:, None] * D + d[None, :]
    begin = tl.program_id(0) % SPLIT * (D // SPLIT)
    biases = bias + expert * D + d
    b = tl.load(biases + begin)
    for first in range(begin, begin + D // SPLIT, BLOCK_D):
        out = tl.dot(h, tl.load(w_cols + first * F))
        out += gate[:, None] * b.to(tl.float32)[None, :]
        # Loaded a step before it is used: the pipeline holds only what enters a product. The last is not used.
        b = tl.load(biases + (first + BLOCK_D) % D)
        tl.store(places + first, out.to(y.dtype.element_ty), mask=(n == held)[:, None])
