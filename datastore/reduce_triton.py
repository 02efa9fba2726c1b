"""The four steps of the reduction as Triton kernels, for CUDA. Legend and contract: datastore/reduce.py.

`measure` reads every logit once: 0.8 MB a position at 201,088 ids, 0.2 us at 4 TB/s. `split` and `draw` then read only
blocks of 1024 ids that hold a head entry or a draw, at most 2/t + 1 of 197. Sums inside a block are fp32, across blocks
float64. No step waits for the device, and every sum has a fixed order, so two runs give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_BLOCKS_A_PROGRAM = 8


@dataclass(slots=True)
class Blocks:
    """Of each block of a row: top logit, sum of exp(z - top), sum of (z - top) exp(z - top). fp32 [3, N, B]."""

    stats_3NB: torch.Tensor


def workspace(logits_NV: torch.Tensor) -> None:
    """Nothing beside the logits."""


def measure(
    logits_NV: torch.Tensor, local_id_N: torch.Tensor, space_NV: None
) -> tuple[torch.Tensor, Blocks]:
    """float64 [3, N]: log-sum-exp of the shard, expectation of its logits, logit of the realised id (0 elsewhere)."""
    num_rows, vocab = logits_NV.shape
    num_blocks = triton.cdiv(vocab, _BLOCK)
    stats_3NB = logits_NV.new_empty(3, num_rows, num_blocks)
    grid = (num_rows, triton.cdiv(num_blocks, _BLOCKS_A_PROGRAM))
    _measure_kernel[grid](
        logits_NV, stats_3NB, num_rows, vocab, num_blocks, _BLOCK, _BLOCKS_A_PROGRAM, num_warps=8
    )
    scalars_3N = logits_NV.new_empty(3, num_rows, dtype=torch.float64)
    _combine_kernel[(num_rows,)](
        *(logits_NV, stats_3NB, local_id_N, scalars_3N, num_rows, vocab, num_blocks),
        triton.next_power_of_2(num_blocks),
    )
    return scalars_3N, Blocks(stats_3NB)


@triton.jit
def _measure_kernel(
    logits, stats, num_rows, vocab, num_blocks, WIDTH: tl.constexpr, GROUP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    ids = blocks[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    z = tl.load(logits + row * vocab + ids, mask=ids < vocab, other=-float("inf"))
    top = tl.max(z, axis=1)
    below = tl.where(ids < vocab, z - top[:, None], 0.0)
    share = tl.where(ids < vocab, tl.exp(below), 0.0)
    place = stats + row * num_blocks + blocks
    size = num_rows.to(tl.int64) * num_blocks
    exists = blocks < num_blocks
    tl.store(place, top, mask=exists)
    tl.store(place + size, tl.sum(share, axis=1), mask=exists)
    tl.store(place + 2 * size, tl.sum(share * below, axis=1), mask=exists)


@triton.jit
def _combine_kernel(
    logits, stats, local_ids, scalars, num_rows, vocab, num_blocks, BLOCKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    exists = blocks < num_blocks
    place = stats + row * num_blocks + blocks
    size = num_rows.to(tl.int64) * num_blocks
    top = tl.load(place, mask=exists, other=-float("inf")).to(tl.float64)
    total = tl.load(place + size, mask=exists, other=0.0).to(tl.float64)
    weighted = tl.load(place + 2 * size, mask=exists, other=0.0).to(tl.float64)
    highest = tl.max(top, axis=0)
    scale = tl.where(exists, tl.exp(top - highest), 0.0)
    mass = tl.sum(scale * total, axis=0)
    product = tl.where(exists, scale * (weighted + total * top), 0.0)
    local_id = tl.load(local_ids + row)
    owned = (local_id >= 0) & (local_id < vocab)
    realised = tl.load(logits + row * vocab + local_id, mask=owned, other=0.0)
    tl.store(scalars + row, highest + tl.log(mass))
    tl.store(scalars + num_rows + row, tl.sum(product, axis=0) / mass)
    tl.store(scalars + 2 * num_rows + row, realised.to(tl.float64))


def split(
    logits_NV: torch.Tensor, blocks: Blocks, lse_N: torch.Tensor, threshold: float, most: int
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """((logits fp32 [N, K], local ids int32 [N, K], number in use [N]) of the head, tail mass float64 [N, B])."""
    num_rows, vocab = logits_NV.shape
    num_blocks = blocks.stats_3NB.shape[2]
    z_NK = logits_NV.new_zeros(num_rows, most)
    ids_NK = logits_NV.new_zeros((num_rows, most), dtype=torch.int32)
    num_N = logits_NV.new_empty(num_rows, dtype=torch.int32)
    tail_NB = logits_NV.new_empty((num_rows, num_blocks), dtype=torch.float64)
    scratch_NB = logits_NV.new_empty((num_rows, num_blocks), dtype=torch.int32)
    _split_kernel[(num_rows,)](
        *(logits_NV, blocks.stats_3NB, lse_N, z_NK, ids_NK, num_N, tail_NB, scratch_NB),
        *(num_rows, vocab, num_blocks, most, math.log(threshold)),
        *(_BLOCK, triton.next_power_of_2(num_blocks)),
    )
    return (z_NK, ids_NK, num_N), tail_NB


@triton.jit
def _split_kernel(
    logits,
    stats,
    lse_rows,
    head_z,
    head_ids,
    num_heads,
    tail,
    scratch,
    num_rows,
    vocab,
    num_blocks,
    most,
    log_threshold,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lse = tl.load(lse_rows + row)
    cut = (lse + log_threshold).to(tl.float32)
    blocks = tl.arange(0, BLOCKS)
    exists = blocks < num_blocks
    place = stats + row * num_blocks
    size = num_rows.to(tl.int64) * num_blocks
    top = tl.load(place + blocks, mask=exists, other=-float("inf"))
    total = tl.load(place + size + blocks, mask=exists, other=0.0)
    mass = total.to(tl.float64) * tl.exp(top.to(tl.float64) - lse)
    tl.store(tail + row * num_blocks + blocks, mass, mask=exists)
    is_candidate = exists & (top >= cut)
    slot = tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
    tl.store(scratch + row * num_blocks + slot, blocks, mask=is_candidate)
    tl.debug_barrier()  # the list of candidates and the masses are read and written by other threads below
    count = 0
    for number in range(tl.sum(is_candidate.to(tl.int32), axis=0)):
        block = tl.load(scratch + row * num_blocks + number)
        ids = block * WIDTH + tl.arange(0, WIDTH)
        z = tl.load(logits + row * vocab + ids, mask=ids < vocab, other=-float("inf"))
        is_head = z >= cut
        head_slot = count + tl.cumsum(is_head.to(tl.int32), axis=0) - 1
        kept = is_head & (head_slot < most)
        tl.store(head_z + row * most + head_slot, z, mask=kept)
        tl.store(head_ids + row * most + head_slot, ids, mask=kept)
        count += tl.sum(is_head.to(tl.int32), axis=0)
        block_top = tl.load(place + block)
        rest = tl.sum(tl.where(is_head, 0.0, tl.exp(z - block_top)), axis=0)
        rest_mass = rest.to(tl.float64) * tl.exp(block_top.to(tl.float64) - lse)
        tl.store(tail + row * num_blocks + block, rest_mass)
    tl.store(num_heads + row, tl.minimum(count, most))


def draw(
    logits_NV: torch.Tensor,
    blocks: Blocks,
    lse_N: torch.Tensor,
    threshold: float,
    tail_NB: torch.Tensor,
    points_NJ: torch.Tensor,
) -> torch.Tensor:
    """The local id int32 [N, J] that holds each point of the shard's tail mass; 0 for points below 0."""
    vocab, num_blocks = logits_NV.shape[1], tail_NB.shape[1]
    draws_NJ = logits_NV.new_zeros(points_NJ.shape, dtype=torch.int32)
    _draw_kernel[points_NJ.shape](
        *(logits_NV, blocks.stats_3NB, lse_N, tail_NB, points_NJ.contiguous(), draws_NJ),
        # No id weighs as much as the spacing of the points, also in fp32: so none is drawn twice.
        *(vocab, num_blocks, threshold * (1 - 2**-20), math.log(threshold)),
        *(_BLOCK, triton.next_power_of_2(num_blocks)),
    )
    return draws_NJ


@triton.jit
def _draw_kernel(
    logits,
    stats,
    lse_rows,
    tail,
    points,
    draws,
    vocab,
    num_blocks,
    most_mass,
    log_threshold,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = row * tl.num_programs(1) + tl.program_id(1)
    point = tl.load(points + place)
    if point >= 0:
        lse = tl.load(lse_rows + row)
        cut = (lse + log_threshold).to(tl.float32)
        blocks = tl.arange(0, BLOCKS)
        mass = tl.load(tail + row * num_blocks + blocks, mask=blocks < num_blocks, other=0.0)
        ends = tl.cumsum(mass, axis=0)
        # A point that rounding puts at or past the end falls in the last interval that has mass.
        last = tl.sum((ends < tl.max(ends, axis=0)).to(tl.int32), axis=0)
        block = tl.minimum(tl.sum((ends <= point).to(tl.int32), axis=0), last)
        start = tl.sum(tl.where(blocks == block - 1, ends, 0.0), axis=0)

        ids = block * WIDTH + tl.arange(0, WIDTH)
        z = tl.load(logits + row * vocab + ids, mask=ids < vocab, other=-float("inf"))
        top = tl.load(stats + row * num_blocks + block)
        share = tl.where(z >= cut, 0.0, tl.exp(z - top)).to(tl.float64)
        p = tl.minimum(share * tl.exp(top.to(tl.float64) - lse), most_mass)
        inner_ends = tl.cumsum(p, axis=0)
        inner_last = tl.sum((inner_ends < tl.max(inner_ends, axis=0)).to(tl.int32), axis=0)
        within = tl.sum((inner_ends <= point - start).to(tl.int32), axis=0)
        tl.store(draws + place, block * WIDTH + tl.minimum(within, inner_last))


def pack(
    counts_N2: torch.Tensor,
    floats_N3: torch.Tensor,
    lse_N: torch.Tensor,
    z_NK: torch.Tensor,
    ids_NK: torch.Tensor,
    draws_NJ: torch.Tensor,
) -> torch.Tensor:
    """Packed rows int32 [N, C]; equal logits stand in the order of their ids. What is not in use is 0."""
    num_rows, most = z_NK.shape
    packed_NC = counts_N2.new_zeros(num_rows, 6 + 2 * most)
    packed_NC[:, :2], packed_NC[:, 2:5] = counts_N2, floats_N3.view(torch.int32)
    _pack_kernel[(num_rows,)](
        *(lse_N, z_NK.contiguous(), ids_NK.contiguous(), draws_NJ.contiguous(), packed_NC, most),
        triton.next_power_of_2(most + 1),
    )
    return packed_NC


@triton.jit
def _pack_kernel(lse_rows, head_z, head_ids, draws, packed, most, SLOTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    out = packed + row * (6 + 2 * most)
    num_heads = tl.load(out)
    num_draws = tl.load(out + 1)
    slots = tl.arange(0, SLOTS)
    others = tl.arange(0, SLOTS)
    z = tl.load(head_z + row * most + slots, mask=slots < num_heads, other=-float("inf"))
    ids = tl.load(head_ids + row * most + slots, mask=slots < num_heads, other=0)
    other_z = tl.load(head_z + row * most + others, mask=others < num_heads, other=-float("inf"))
    other_ids = tl.load(head_ids + row * most + others, mask=others < num_heads, other=0)
    higher = other_z[None, :] > z[:, None]
    tied = (other_z[None, :] == z[:, None]) & (other_ids[None, :] < ids[:, None])
    rank = tl.sum(((higher | tied) & (others < num_heads)[None, :]).to(tl.int32), axis=1)
    logprob = tl.minimum(z.to(tl.float64) - tl.load(lse_rows + row), 0.0).to(tl.float32)
    tl.store(out + 5 + rank, ids, mask=slots < num_heads)
    tl.store(out + 6 + most + rank, logprob.to(tl.int32, bitcast=True), mask=slots < num_heads)
    is_drawn = (slots < num_draws) & (num_heads + slots <= most)
    drawn = tl.load(draws + row * (most + 1) + slots, mask=is_drawn, other=0)
    tl.store(out + 5 + num_heads + slots, drawn, mask=is_drawn)
