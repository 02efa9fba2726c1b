"""Slots sorted by expert, the row tiles of grouped products, and the sum over a token's slots, as Triton kernels.

A token has K slots, t * K + k, one for each of its experts. The sort is a counting sort: a histogram of each block of
slots, one running sum over [experts, blocks], ranks inside a block by comparing all pairs. All in integers and without
atomics, so two runs give the same bits; nothing waits for the device and all sizes are known beforehand, so a CUDA
graph can hold it.

Where ranks share experts, a rank sorts the slots of all tokens, and those of experts elsewhere stand last: no kernel
has a row for them, no sum reads one.

Shapes: T tokens, K slots of each, N = T K slots, E experts, D hidden size, L tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from common.errors import ConfigError

_SORT_BLOCK = (
    128  # slots a program: 128^2 comparisons, 64 a thread at 8 warps; 256^2 spill registers
)
_TILES_BLOCK = 64
_LONGEST_BLOCK = 32  # experts that all are compared with at a time
# Numbers of rows are not specialised: sampling and training have others, and each kind would be compiled.


TileMap = tuple[torch.Tensor, torch.Tensor]  # see `tiles`
TileMaps = dict[int, TileMap]  # by rows of a tile


class SumConfig(NamedTuple):
    """Tokens and warps of a program."""

    tokens: int
    warps: int


SUM = SumConfig(tokens=1, warps=2)


class Slots(NamedTuple):
    """Where each slot of each token goes; all int32, on the device.

    order_N: the slots t * K + k by expert, those of one expert in rising order; place_TK: the position of each slot in
    it, its inverse; rows_E: slots of each expert; ends_E: their running sum, the expert's own rows included;
    longest_E: the experts by falling rows, ties to the lower id. held_1: how many slots are of experts here, the first
    ones; None: all are.
    """

    order_N: torch.Tensor
    place_TK: torch.Tensor
    rows_E: torch.Tensor
    ends_E: torch.Tensor
    longest_E: torch.Tensor
    held_1: torch.Tensor | None = None


def sort_slots(experts_TK: torch.Tensor, num_experts: int, first: int | None = None) -> Slots:
    """Slots sorted by expert, stable. experts_TK: int32 [T, K] in 0 .. num_experts - 1; T may be 0.

    first: only the experts first .. first + num_experts - 1 are here, whatever others experts_TK names.
    ConfigError: another dtype.
    """
    if experts_TK.dtype != torch.int32:
        raise ConfigError(
            "Experts of tokens cannot be sorted",
            got=experts_TK.dtype,
            expected="int32",
            remedy="convert them",
        )
    experts_TK = experts_TK.contiguous()
    order_N, place_TK = experts_TK.new_empty(experts_TK.numel()), torch.empty_like(experts_TK)
    slots = order_N.numel()
    rows_E, ends_E, longest_E = of_experts = experts_TK.new_empty(3, num_experts).unbind(0)
    some = first is not None
    sorted_slots = Slots(order_N, place_TK, *of_experts, ends_E[-1:] if some else None)
    if slots == 0:
        rows_E.zero_()
        ends_E.zero_()
        torch.arange(num_experts, out=longest_E)
        return sorted_slots
    blocks = triton.cdiv(slots, _SORT_BLOCK)
    # One more for what is elsewhere, the last.
    keys = num_experts + some
    counts_EB, padded = experts_TK.new_empty(keys, blocks), triton.next_power_of_2(keys)
    _histogram_kernel[(blocks,)](
        *(experts_TK, counts_EB, slots, blocks, first or 0, num_experts, keys),
        *(some, padded, _SORT_BLOCK),
        num_warps=4,
    )
    # Expert after expert, block after block: the sum up to (e, b) is where the next block's slots of e begin.
    sums_EB = counts_EB.view(-1).cumsum(0, dtype=torch.int32)
    _rank_kernel[(blocks,)](
        *(experts_TK, sums_EB, order_N, place_TK, *of_experts, slots, blocks, first or 0),
        *(num_experts, some, padded, math.gcd(padded, _LONGEST_BLOCK), _SORT_BLOCK),
        num_warps=8,
    )
    return sorted_slots


@triton.jit(do_not_specialize=["slots", "blocks", "first"])
def _histogram_kernel(
    experts,
    counts,
    slots,
    blocks,
    first,
    num_experts,
    keys,
    SOME_HERE: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < slots
    key = _key(tl.load(experts + i, mask=inside, other=0), first, num_experts, SOME_HERE)
    e = tl.arange(0, E)
    count = tl.histogram(key, E, mask=inside)
    tl.store(counts + e * blocks + block, count, mask=e < keys)


@triton.jit
def _key(expert, first, num_experts, SOME_HERE: tl.constexpr):
    """The expert's number here; num_experts for one that is elsewhere."""
    if not SOME_HERE:
        return expert
    here = (expert >= first) & (expert < first + num_experts)
    return tl.where(here, expert - first, num_experts)


@triton.jit(do_not_specialize=["slots", "blocks", "first"])
def _rank_kernel(
    experts,
    sums,
    order,
    place,
    rows,
    ends,
    longest,
    slots,
    blocks,
    first,
    num_experts,
    SOME_HERE: tl.constexpr,
    E: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    key = _key(tl.load(experts + i, mask=i < slots, other=-1), first, num_experts, SOME_HERE)
    earlier = (key[None, :] == key[:, None]) & (i[None, :] < i[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    cell = key * blocks + block
    begin = tl.load(sums + cell - 1, mask=(i < slots) & (cell > 0), other=0)
    tl.store(place + i, begin + rank, mask=i < slots)
    tl.store(order + begin + rank, i, mask=i < slots)
    if block == 0:
        e = tl.arange(0, E)
        end, count = _ends_and_rows(sums, e, blocks, num_experts)
        tl.store(ends + e, end, mask=e < num_experts)
        tl.store(rows + e, count, mask=e < num_experts)
        longer = tl.zeros((E,), tl.int32)
        for begin_of in range(0, E, SOME):
            other = begin_of + tl.arange(0, SOME)
            _, others = _ends_and_rows(sums, other, blocks, num_experts)
            tie = (others[None, :] == count[:, None]) & (other[None, :] < e[:, None])
            longer += tl.sum(((others[None, :] > count[:, None]) | tie).to(tl.int32), axis=1)
        tl.store(longest + longer, e, mask=e < num_experts)


@triton.jit
def _ends_and_rows(sums, e, blocks, num_experts):
    """Of experts e; -1 rows of what is none."""
    inside = e < num_experts
    end = tl.load(sums + e * blocks + blocks - 1, mask=inside, other=0)
    first = tl.load(sums + e * blocks - 1, mask=(e > 0) & inside, other=0)
    return end, tl.where(inside, end - first, -1)


def tiles(rows_E: torch.Tensor, block_m: int, slots: int) -> TileMap:
    """Expert and first row, int32 [L] each, of every tile of `block_m` rows; a tile holds rows of one expert.

    L = slots // block_m + E is enough for any rows_E (int32 [E], `slots` in all); unused tiles have expert -1 and stand
    last. Tiles of one expert follow each other, so that its weights are still in the L2 cache.
    """
    num_experts = rows_E.numel()
    size = slots // block_m + num_experts
    expert_L, start_L = rows_E.new_empty(size), rows_E.new_empty(size)
    _tiles_kernel[(triton.cdiv(size, _TILES_BLOCK),)](
        *(rows_E, expert_L, start_L, num_experts, size),
        *(triton.next_power_of_2(num_experts), block_m, _TILES_BLOCK),
    )
    return expert_L, start_L


def known_tiles(slots: Slots, block_m: int, known: TileMaps | None) -> TileMap:
    """`tiles` of these slots, out of `known`, or made and put there: kernels with tiles of one size share them."""
    known = {} if known is None else known
    if block_m not in known:
        known[block_m] = tiles(slots.rows_E, block_m, slots.order_N.numel())
    return known[block_m]


@triton.jit(do_not_specialize=["size"])
def _tiles_kernel(
    rows,
    tile_expert,
    tile_start,
    num_experts,
    size,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = tl.arange(0, E)
    row = tl.load(rows + e, mask=e < num_experts, other=0)
    count = (row + BLOCK_M - 1) // BLOCK_M
    first_row = tl.cumsum(row, axis=0) - row
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert, own, inside = nth(i, count)
    start = tl.sum(tl.where(own, first_row[None, :] + inside * BLOCK_M, 0), axis=1)
    used = i < tl.sum(count, axis=0)
    tl.store(tile_expert + i, tl.where(used, expert, -1), mask=i < size)
    tl.store(tile_start + i, tl.where(used, start, 0), mask=i < size)


@triton.jit
def nth(i, count_E):
    """Of a list with count_E items for each entry, one entry after another: the entry of item i, and of items and
    entries whether they belong together and the item's number in the entry.
    """
    e, ends = tl.arange(0, count_E.shape[0]), tl.cumsum(count_E, axis=0)
    entry = tl.sum((ends[None, :] <= i[:, None]).to(tl.int32), axis=1)
    return entry, e[None, :] == entry[:, None], i[:, None] - (ends - count_E)[None, :]


@triton.jit
def tile_rows(tile_start, ends, tile, expert, BLOCK_M: tl.constexpr):
    """Rows of a used tile, as they are numbered and held inside the expert's own rows: tails repeat the last row, so
    that loads need no mask, and are not stored.
    """
    n = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
    return n, tl.minimum(n, tl.load(ends + expert) - 1)


@triton.jit
def into_registers(tile):
    """The tile [M, F], F at least 16, as fp32, where the next products take their left factor from: in registers.

    A product with ones on the diagonal, which changes no finite number. Out of shared memory, each product would read
    its left factor anew (experts.down: 152 to 140 us, H200).
    """
    f = tl.arange(0, tile.shape[1])
    ones = tl.where(f[:, None] == f[None, :], 1.0, 0.0).to(tile.dtype)
    return tl.dot(tile, ones)


def sum_slots(
    y_ND: torch.Tensor,
    place_TK: torch.Tensor,
    bases_TD: Sequence[torch.Tensor] = (),
    config: SumConfig = SUM,
    held_1: torch.Tensor | None = None,
    more: tuple[torch.Tensor, torch.Tensor] | None = None,
    out_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, D] of y's dtype: the sum over each token's slots and of bases, in fp32 in the order of k, rounded once.

    y_ND: rows in the order of slots; place_TK, held_1: see Slots; more: other rows, and each token's places in them;
    bases: at most three [T, D]; all of y's dtype. out_TD: where to write it, contiguous. No gradient of its own.
    """
    (tokens, K), D = place_TK.shape, y_ND.shape[1]
    more_YD, more_TM = more or (y_ND, place_TK)
    out_TD = y_ND.new_empty(tokens, D) if out_TD is None else out_TD
    bases = [base.contiguous() for base in bases_TD]
    if tokens:
        _sum_kernel[(triton.cdiv(tokens, config.tokens),)](
            *(y_ND, place_TK, *(bases + [y_ND] * 3)[:3], out_TD, tokens),
            *(place_TK if held_1 is None else held_1, more_YD, more_TM),
            *(held_1 is not None, more_TM.shape[1] if more else 0),
            *(len(bases), D, triton.next_power_of_2(D), K, config.tokens),
            num_warps=config.warps,
        )
    return out_TD


@triton.jit(do_not_specialize=["tokens"])
def _sum_kernel(
    y,
    place,
    base,
    second,
    third,
    out,
    tokens,
    held,
    more,
    more_place,
    SOME_HERE: tl.constexpr,
    MORE: tl.constexpr,
    BASES: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    inside = (t < tokens)[:, None] & (d < D)[None, :]
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place + t * K + k, mask=t < tokens, other=0).to(tl.int64)
        there = inside
        if SOME_HERE:
            there = inside & (row < tl.load(held))[:, None]
        total += tl.load(y + row[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
    for k in tl.static_range(MORE):
        row = tl.load(more_place + t * MORE + k, mask=t < tokens, other=0).to(tl.int64)
        rows = more + row[:, None] * D + d[None, :]
        total += tl.load(rows, mask=inside, other=0.0).to(tl.float32)
    own = t.to(tl.int64)[:, None] * D + d[None, :]
    if BASES > 0:
        total += tl.load(base + own, mask=inside, other=0.0).to(tl.float32)
    if BASES > 1:
        total += tl.load(second + own, mask=inside, other=0.0).to(tl.float32)
    if BASES > 2:
        total += tl.load(third + own, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + own, total.to(out.dtype.element_ty), mask=inside)
