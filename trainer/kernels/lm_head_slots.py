"""The few ids of a position that the loss at the lm_head treats one by one, as Triton kernels for CUDA.

Legend: C positions of a chunk, D hidden size, W rows of the vocabulary on this rank, J slots of a position (label and
teacher entries), M words of marks. Rows of the vocabulary are local; -1 stands for an id that lives on another rank.
The bulk of the work is in trainer/kernels/lm_head.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WORD = 32  # ids a word of the marks
_SLOTS = 8  # slots a program: 21 slots of 2 kB are 3 programs a position
_WIDTH = 256
_BLOCK = 4096


def slot_logits(
    hidden_CD: torch.Tensor, weight_WD: torch.Tensor, rows_CJ: torch.Tensor
) -> torch.Tensor:
    """fp32 [C, J], hidden . weight[row] summed in fp32; -inf at row -1.

    hidden_CD, weight_WD: bf16, contiguous. rows_CJ: int64, contiguous. Equal rows of a position have equal bits.
    """
    (num_rows, dim), num_slots = hidden_CD.shape, rows_CJ.shape[1]
    logits_CJ = hidden_CD.new_empty((num_rows, num_slots), dtype=torch.float32)
    slots = min(_SLOTS, triton.next_power_of_2(num_slots))
    _slot_logits_kernel[(num_rows, triton.cdiv(num_slots, slots))](
        *(hidden_CD, weight_WD, rows_CJ, logits_CJ, num_slots), dim, slots, _WIDTH, num_warps=4
    )
    return logits_CJ


@triton.jit
def _slot_logits_kernel(
    hidden,
    weight,
    slot_rows,
    logits,
    num_slots,
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    place = position * num_slots + slots
    row = tl.load(slot_rows + place, mask=slots < num_slots, other=-1)
    here = row >= 0
    z = tl.zeros((SLOTS,), dtype=tl.float32)
    for start in range(0, DIM, WIDTH):
        k = start + tl.arange(0, WIDTH)
        h = tl.load(hidden + position * DIM + k, mask=k < DIM, other=0.0).to(tl.float32)
        at = weight + tl.where(here, row, 0)[:, None] * DIM + k[None, :]
        w = tl.load(at, mask=here[:, None] & (k < DIM)[None, :], other=0.0).to(tl.float32)
        z += tl.sum(w * h[None, :], axis=1)
    tl.store(logits + place, tl.where(here, z, -float("inf")), mask=slots < num_slots)


def mark_ids(rows_CJ: torch.Tensor, vocab: int) -> torch.Tensor:
    """int32 [C, M], bit r % 32 of word r // 32 set for each row r >= 0 of a position. rows_CJ: int64, contiguous."""
    num_positions, num_slots = rows_CJ.shape
    shape = (num_positions, triton.cdiv(vocab, _WORD))
    marks_CM = torch.zeros(shape, dtype=torch.int32, device=rows_CJ.device)
    slots = triton.next_power_of_2(num_slots)
    _mark_kernel[(num_positions,)](rows_CJ, marks_CM, num_slots, shape[1], slots, num_warps=1)
    return marks_CM


@triton.jit
def _mark_kernel(slot_rows, marks, num_slots, num_words, SLOTS: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    row = tl.load(slot_rows + position * num_slots + slots, mask=slots < num_slots, other=-1)
    bit = tl.full((SLOTS,), 1, tl.int32) << (row % 32).to(tl.int32)
    # Two ids may share a word; an integer "or" has the same result in every order.
    tl.atomic_or(marks + position * num_words + row // 32, bit, mask=row >= 0)


def settle_slots(
    exp_CW: torch.Tensor,
    rows_CJ: torch.Tensor,
    exp_CJ: torch.Tensor,
    add_CJ: torch.Tensor,
    dropped_CJ: torch.Tensor,
) -> None:
    """exp_CW[row] = e + sum of `add` over all slots of that row, rounded to bf16 once; e is 0 where one is dropped.

    rows_CJ: int64, -1 is skipped. exp_CJ: fp32, e of each slot's id. add_CJ: fp32. dropped_CJ: int8, 0 or 1. All
    contiguous. The value is set, not added to what the buffer holds: e - sum(e) of a likely label is a small
    difference of large numbers, which e in bf16 would lose. Slots of one row write the same bits.
    """
    num_positions, num_slots = rows_CJ.shape
    _settle_kernel[(num_positions,)](
        *(exp_CW, rows_CJ, exp_CJ, add_CJ, dropped_CJ, exp_CW.stride(0), num_slots),
        triton.next_power_of_2(num_slots),
        num_warps=1,
    )


@triton.jit
def _settle_kernel(
    exps, slot_rows, values, adds, drops, exp_stride, num_slots, SLOTS: tl.constexpr
):
    position = tl.program_id(0).to(tl.int64)
    first = position * num_slots
    slots = tl.arange(0, SLOTS)
    row = tl.load(slot_rows + first + slots, mask=slots < num_slots, other=-1)
    value = tl.load(values + first + slots, mask=slots < num_slots, other=0.0)
    total = tl.zeros((SLOTS,), dtype=tl.float32)
    dropped = tl.zeros((SLOTS,), dtype=tl.int32)
    for other in range(num_slots):
        same = row == tl.load(slot_rows + first + other)
        total += tl.where(same, tl.load(adds + first + other), 0.0)
        dropped = tl.where(same, dropped | tl.load(drops + first + other).to(tl.int32), dropped)
    value = tl.where(dropped != 0, 0.0, value) + total
    tl.store(exps + position * exp_stride + row, value.to(tl.bfloat16), mask=row >= 0)


def scaled_bf16(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """bf16, values * factor rounded once, in one pass. values: fp32, contiguous; factor: fp32 []."""
    out = torch.empty_like(values, dtype=torch.bfloat16)
    if values.numel():
        grid = (triton.cdiv(values.numel(), _BLOCK),)
        _scale_kernel[grid](values, factor, out, values.numel(), _BLOCK, num_warps=8)
    return out


@triton.jit
def _scale_kernel(values, factor, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + at, mask=at < size) * tl.load(factor)
    tl.store(out + at, value.to(tl.bfloat16), mask=at < size)
