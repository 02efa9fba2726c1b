"""Gradients of the routed experts' weights: products of each expert's rows, as Triton kernels.

dW1 = dz' x and dW2 = g' h with dz and h of experts_backward.inner, added to what is there: the fp32 sums of a step's
micro-batches, which a pass of their own would read and write again. A program sums the rows of one expert, PIECE at
most, for one block of D. An expert with more rows is cut into pieces, whose sums are written aside and added up in
order: without it the layer waits for its busiest expert (a fresh student's has up to 50 times the mean; 0.48 ms where
even loads take 0.17, two H200 with expert parallelism). No atomics: two runs give the same bits.

Bytes at T = 32768, K = 4, D = 1024, F = 128: 570 MB each (in fp32), of which gathered rows are 268 MB (67 MB different
ones); a piece aside is 0.5 MB twice, where its rows are up to 9.4.

Shapes: T tokens, K slots of each, N = T K slots sorted by expert, E experts, D hidden size, F expert width, L pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trainer.kernels.dispatch import Slots, nth
from trainer.kernels.experts_backward import SIDE

PIECE = 4096  # rows; even loads are 512 an expert on one GPU, 4096 with experts spread over eight
_BLOCK = 64


class OuterConfig(NamedTuple):
    """Columns of D a program, rows a step, warps, stages, and the most registers of a thread (None: no limit)."""

    cols: int
    step: int
    warps: int
    stages: int
    registers: int | None = None


OUTER = OuterConfig(cols=128, step=64, warps=8, stages=3, registers=128)


class Pieces(NamedTuple):
    """Expert and number in it, int32 [L] each, of every piece, and the most rows of one; see `pieces`."""

    expert_L: torch.Tensor
    number_L: torch.Tensor
    rows: int


def weight_gradients(
    g_TD: torch.Tensor,
    x_TD: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slots: Slots,
    sums: Sequence[torch.Tensor],
    *,
    add: bool,
) -> None:
    """Of fc1, bias1, fc2, bias2, into `sums`, of their shapes and any dtype; add: to what is in there.

    states: dz, h and side of experts_backward.inner.
    """
    dz_NF, h_NF, side_NC = states
    cut = pieces(slots)
    outer(dz_NF, x_TD, side_NC, slots, *sums[:2], gated=False, add=add, cut=cut)
    outer(h_NF, g_TD, side_NC, slots, *sums[2:], gated=True, add=add, cut=cut)


def pieces(slots: Slots, piece: int = PIECE) -> Pieces:
    """Of at most so many rows, the busiest experts first.

    An expert without rows has one piece. L = N // piece + E is enough; what is not used has expert -1 and stands last.
    """
    num_experts = slots.rows_E.numel()
    size = slots.order_N.numel() // piece + num_experts
    expert_L, number_L = slots.rows_E.new_empty(2, size).unbind()
    _pieces_kernel[(triton.cdiv(size, _BLOCK),)](
        *(slots.rows_E, slots.longest_E, expert_L, number_L, num_experts, size),
        *(triton.next_power_of_2(num_experts), piece, _BLOCK),
    )
    return Pieces(expert_L, number_L, piece)


@triton.jit(do_not_specialize=["size"])
def _pieces_kernel(
    rows,
    longest,
    piece_expert,
    piece_number,
    num_experts,
    size,
    E: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.arange(0, E)
    expert = tl.load(longest + r, mask=r < num_experts, other=0)
    row = tl.load(rows + expert, mask=r < num_experts, other=0)
    count = tl.where(r < num_experts, tl.maximum((row + PIECE - 1) // PIECE, 1), 0)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, own, inside = nth(i, count)
    of = tl.sum(tl.where(own, expert[None, :], 0), axis=1)
    tl.store(piece_expert + i, tl.where(i < tl.sum(count, axis=0), of, -1), mask=i < size)
    tl.store(piece_number + i, tl.sum(tl.where(own, inside, 0), axis=1), mask=i < size)


def outer(
    narrow_NF: torch.Tensor,
    wide_TD: torch.Tensor,
    side_NC: torch.Tensor,
    slots: Slots,
    weight_sum: torch.Tensor,
    bias_sum: torch.Tensor,
    *,
    gated: bool,
    add: bool,
    cut: Pieces,
    config: OuterConfig = OUTER,
) -> None:
    """Gradients of a weight and its bias, sums over the rows n of each expert, written or, with `add`, added there.

    narrow[n]' wide[token of n], [E, F, D], and the sum of narrow, [E, F]; gated: the transpose, [E, D, F], and the sum
    of gate * wide, [E, D]. An expert without rows gets zeros. cut: `pieces` of these slots.
    """
    (N, F), D, K = narrow_NF.shape, wide_TD.shape[1], slots.place_TK.shape[1]
    (expert_L, number_L, piece), cols = cut, math.gcd(config.cols, D)
    # Two for each whole piece of the slots: see `_aside`.
    most = N // piece
    asides = weight_sum.new_empty(2 * most + 2 if most else 0, F * D, dtype=torch.float32)
    bias_asides = asides.new_empty(len(asides), D if gated else F)
    _outer_kernel[(len(expert_L) * (D // cols),)](
        *(narrow_NF, wide_TD, side_NC, slots.order_N, slots.rows_E, slots.ends_E),
        *(expert_L, number_L, weight_sum, bias_sum, asides, bias_asides),
        *(gated, add, K, D, F, SIDE, piece, config.step, cols),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    if most:
        block = math.gcd(F * D, 4096)
        _fold_kernel[(most, F * D // block)](
            *(slots.rows_E, slots.ends_E, slots.longest_E, len(slots.rows_E)),
            *(weight_sum, bias_sum, asides, bias_asides),
            *(add, F * D, D if gated else F, triton.next_power_of_2(D if gated else F)),
            *(piece, block),
        )


@triton.jit
def _aside(begin, end, of_expert_end, PIECE: tl.constexpr):
    """Where the sum of a piece of a cut expert lies: whole pieces begin PIECE rows apart, last ones more."""
    return (2 * (begin // PIECE) + (end == of_expert_end).to(tl.int32)).to(tl.int64)


@triton.jit
def _outer_kernel(
    narrow,
    wide,
    side,
    order,
    rows_of,
    ends,
    piece_expert,
    piece_number,
    weight_sum,
    bias_sum,
    asides,
    bias_asides,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    SIDE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    number = tl.program_id(0) // (D // BLOCK_D)
    expert = tl.load(piece_expert + number)
    if expert < 0:
        return
    block = tl.program_id(0) % (D // BLOCK_D)
    of_end, count = tl.load(ends + expert), tl.load(rows_of + expert)
    begin = of_end - count + tl.load(piece_number + number) * PIECE
    end = tl.minimum(begin + PIECE, of_end)
    f, d, c = tl.arange(0, F), block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, SIDE)
    total, sums = _products(
        *(narrow, wide, side, order, begin, end, f, d, c),
        *(GATED, K, D, F, SIDE, BLOCK_N, BLOCK_D),
    )
    if GATED:
        cells, bias_cells, size = d[:, None] * F + f[None, :], d, D
        of_bias = tl.sum(tl.where(c[None, :] < 2, sums, 0.0), axis=1)
    else:
        cells, bias_cells, size = f[:, None] * D + d[None, :], f, F
        of_bias = tl.sum(tl.where(c[None, :] == 2, sums, 0.0), axis=1)
    whole, aside, of = count <= PIECE, _aside(begin, end, of_end, PIECE), expert.to(tl.int64)
    _put(total, weight_sum + of * D * F, asides + aside * D * F, cells, whole, ADD)
    # All blocks of an expert have the sum of the narrow rows.
    if GATED or block == 0:
        _put(of_bias, bias_sum + of * size, bias_asides + aside * size, bias_cells, whole, ADD)


@triton.jit
def _products(
    narrow,
    wide,
    side,
    order,
    begin,
    end,
    f,
    d,
    c,
    GATED: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Of the rows from begin to end: of wide and narrow (gated) or the transpose, and with side in place of narrow.
    if GATED:
        total, sums = tl.zeros((BLOCK_D, F), tl.float32), tl.zeros((BLOCK_D, SIDE), tl.float32)
    else:
        total, sums = tl.zeros((F, BLOCK_D), tl.float32), tl.zeros((F, SIDE), tl.float32)
    n = begin + tl.arange(0, BLOCK_N)
    token = tl.load(order + n, mask=n < end, other=0) // K
    for _ in range(begin, end, BLOCK_N):
        inside, row = (n < end)[:, None], n.to(tl.int64)[:, None]
        a = tl.load(narrow + row * F + f[None, :], mask=inside, other=0.0)
        b = tl.load(wide + token.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
        s = tl.load(side + row * SIDE + c[None, :], mask=inside, other=0.0)
        if GATED:
            total = tl.dot(tl.trans(b), a, total)
            sums = tl.dot(tl.trans(b), s, sums)
        else:
            total = tl.dot(tl.trans(a), b, total)
            sums = tl.dot(tl.trans(a), s, sums)
        # Loaded a step before it is used: an index inside the pipeline would cost it a stage.
        n += BLOCK_N
        token = tl.load(order + n, mask=n < end, other=0) // K
    return total, sums


@triton.jit
def _put(value, place, aside, cells, whole, ADD: tl.constexpr):
    """The sum of a whole expert where it belongs, of a piece aside."""
    if whole:
        if ADD:
            value += tl.load(place + cells).to(tl.float32)
        tl.store(place + cells, value.to(place.dtype.element_ty))
    else:
        tl.store(aside + cells, value)


@triton.jit
def _fold_kernel(
    rows_of,
    ends,
    longest,
    num_experts,
    weight_sum,
    bias_sum,
    asides,
    bias_asides,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # At most N // PIECE experts are cut, and they are the busiest.
    rank = tl.program_id(0)
    if rank >= num_experts:
        return
    expert = tl.load(longest + rank)
    count, of_end = tl.load(rows_of + expert), tl.load(ends + expert)
    if count <= PIECE:
        return
    cells = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, BIAS_WIDTH)
    total, of_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BIAS_WIDTH,), tl.float32)
    for begin in range(of_end - count, of_end, PIECE):
        aside = _aside(begin, tl.minimum(begin + PIECE, of_end), of_end, PIECE)
        total += tl.load(asides + aside * SIZE + cells)
        of_bias += tl.load(bias_asides + aside * BIAS + c, mask=c < BIAS, other=0.0)
    places = weight_sum + expert.to(tl.int64) * SIZE + cells
    if ADD:
        total += tl.load(places).to(tl.float32)
    tl.store(places, total.to(weight_sum.dtype.element_ty))
    if tl.program_id(1) == 0:
        bias_places = bias_sum + expert * BIAS + c
        if ADD:
            of_bias += tl.load(bias_places, mask=c < BIAS, other=0.0).to(tl.float32)
        tl.store(bias_places, of_bias.to(bias_sum.dtype.element_ty), mask=c < BIAS)
