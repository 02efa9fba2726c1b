"""Exponentials of the lm_head's logits without the logits, as Triton kernels for CUDA; used by losses/exp_chunk.py.

Legend: C positions of a chunk, D hidden size, W rows of the vocabulary on this rank, J slots (ids of which a position
needs the logit itself: label and teacher entries), N blocks of ids.

A tile of z = h W' stays in registers: its epilogue takes e = exp2(z log2(e) - c) with an offset c of the row known
beforehand, writes e in bf16 and, of each row and block of ids, the fp32 sum of e (before rounding) and the largest
exponent. So [C, W] is written once in 2 bytes, where fp32 logits take 6 passes of 4 bytes. All exponents are in base 2:
exp2 is one instruction, and its argument one fused multiply-add.

Every sum has a fixed order and integer atomics alone are used, so two runs give the same bits; nothing waits for the
device, all shapes are known on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tiles:
    """Shape of the product's tiles: rows x ids, depth of a step over D; warps of a program, steps in flight.

    tma: operands by the tensor memory accelerator, else by pointers. programs: 0 is one program a tile; more is that
    many programs (one an SM), each of which goes on to its next tile.
    """

    rows: int = 128
    ids: int = 128
    depth: int = 64
    warps: int = 4
    stages: int = 3
    tma: bool = True
    programs: int = 264

    def by_pointers(self) -> Tiles:
        """The same without the tensor memory accelerator."""
        return replace(self, tma=False)


# 128 x 128 by two programs an SM, each of which goes on to its next tile: while one writes, the other multiplies. 667
# TFLOP/s on an H200 against 634 of the best 128 x 256 and cuBLAS's 748 (benchmarks/loss_variants.py).
TILES = Tiles()
# Programs a block of rows in the second pass: 32 blocks of a chunk of 4096 leave at once in one wave on 132 SMs.
_AGAIN = 16


@dataclass(frozen=True)
class BlockStats:
    """Of each row and block of `tiles.ids` ids, [N, C]: fp32 sum of e, fp32 largest exponent, int32 id of that.

    top_ids_NC: None where the ids are not wanted. Ids are local rows of the vocabulary.
    """

    sums_NC: torch.Tensor
    tops_NC: torch.Tensor
    top_ids_NC: torch.Tensor | None

    @classmethod
    def empty(cls, hidden_CD: torch.Tensor, vocab: int, tiles: Tiles, *, top: bool) -> BlockStats:
        """Of `vocab` ids for the rows of hidden; top: with the ids."""
        shape = (triton.cdiv(vocab, tiles.ids), len(hidden_CD))
        sums_NC, tops_NC = (hidden_CD.new_empty(shape, dtype=torch.float32) for _ in range(2))
        return cls(sums_NC, tops_NC, torch.empty_like(sums_NC, dtype=torch.int32) if top else None)


def exp_buffer(num_rows: int, vocab: int, device: torch.device) -> torch.Tensor:
    """bf16 [num_rows, vocab], rows 32 bytes apart in steps: what vector stores and cuBLAS want."""
    padded = triton.cdiv(vocab, 16) * 16
    return torch.empty((num_rows, padded), dtype=torch.bfloat16, device=device)[:, :vocab]


def fits_tma(*operands: torch.Tensor) -> bool:
    """Whether addresses and rows are multiples of 16 bytes, as the tensor memory accelerator needs them."""
    return all(
        each.data_ptr() % 16 == 0 and each.stride(0) * each.element_size() % 16 == 0
        for each in operands
    )


def exp_products(
    hidden_CD: torch.Tensor,
    weight_WD: torch.Tensor,
    offset_C: torch.Tensor,
    stats: BlockStats,
    tiles: Tiles,
    *,
    exp_CW: torch.Tensor | None = None,
    marks_CM: torch.Tensor | None = None,
    again_C: torch.Tensor | None = None,
) -> None:
    """Write `stats` and e = exp2(z log2(e) - offset) of z = hidden weight'.

    hidden_CD, weight_WD: bf16, contiguous. offset_C: fp32. exp_CW: bf16 of `exp_buffer`, None: not kept. marks_CM: of
    `lm_head_slots.mark_ids`; marked ids have e = 0 and add nothing to the sums, but count for the largest exponent.
    again_C: bool, only blocks of rows that hold a true are written; the others' programs leave at once.
    """
    num_rows, dim = hidden_CD.shape
    vocab = len(weight_WD)
    hidden: torch.Tensor | TensorDescriptor = hidden_CD
    weight: torch.Tensor | TensorDescriptor = weight_WD
    if tiles.tma:
        hidden = TensorDescriptor.from_tensor(hidden_CD, [tiles.rows, tiles.depth])
        weight = TensorDescriptor.from_tensor(weight_WD, [tiles.ids, tiles.depth])
    row_tiles, id_tiles = triton.cdiv(num_rows, tiles.rows), triton.cdiv(vocab, tiles.ids)
    unused = stats.sums_NC  # an argument that the kernel's variant does not read
    where = (
        *(hidden, weight, offset_C, unused if exp_CW is None else exp_CW),
        *(stats.sums_NC, stats.tops_NC),
        *(unused if stats.top_ids_NC is None else stats.top_ids_NC,),
        *(unused if marks_CM is None else marks_CM,),
    )
    sizes = (
        *(num_rows, vocab),
        *(0 if exp_CW is None else exp_CW.stride(0), 0 if marks_CM is None else marks_CM.stride(0)),
    )
    variant = {
        "DIM": dim,
        "ROWS": tiles.rows,
        "IDS": tiles.ids,
        "DEPTH": tiles.depth,
        "TMA": tiles.tma,
        "KEEP": exp_CW is not None,
        "TOP_IDS": stats.top_ids_NC is not None,
        "MARKED": marks_CM is not None,
        "WHOLE_TILES": vocab % tiles.ids == 0,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    if again_C is not None:
        flags_R = _any_of_tile(again_C, row_tiles, tiles.rows)
        _exp_again_kernel[(row_tiles, min(_AGAIN, id_tiles))](*where, flags_R, *sizes, **variant)
        return
    programs = min(tiles.programs or row_tiles * id_tiles, row_tiles * id_tiles)
    _exp_kernel[(programs,)](*where, *sizes, **variant, LOOP=tiles.programs > 0)


def _any_of_tile(flag_C: torch.Tensor, num_tiles: int, rows: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(flag_C, (0, num_tiles * rows - len(flag_C)))
    return padded.view(num_tiles, rows).any(dim=1).int()


@triton.jit
def _products(
    hidden,
    weight,
    first_row,
    first_id,
    num_rows,
    vocab,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """fp32 [ROWS, IDS]; rows and ids outside repeat the last one or are 0."""
    z = tl.zeros((ROWS, IDS), dtype=tl.float32)
    if TMA:
        for k in range(0, DIM, DEPTH):
            h = hidden.load([first_row, k])
            w = weight.load([first_id, k])
            z = tl.dot(h, w.T, z)
    else:
        depth = tl.arange(0, DEPTH)
        rows = tl.minimum(first_row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
        ids = tl.minimum(first_id + tl.arange(0, IDS), vocab - 1).to(tl.int64)
        h_at = hidden + rows[:, None] * DIM + depth[None, :]
        w_at = weight + ids[:, None] * DIM + depth[None, :]
        for k in range(0, DIM, DEPTH):
            if DIM % DEPTH == 0:
                h = tl.load(h_at + k)
                w = tl.load(w_at + k)
            else:
                h = tl.load(h_at + k, mask=(k + depth < DIM)[None, :], other=0.0)
                w = tl.load(w_at + k, mask=(k + depth < DIM)[None, :], other=0.0)
            z = tl.dot(h, tl.trans(w), z)
    return z


@triton.jit
def _exp_tile(
    hidden,
    weight,
    offsets,
    exps,
    sums,
    tops,
    top_ids,
    marks,
    num_rows,
    vocab,
    exp_stride,
    mark_stride,
    row_tile,
    id_tile,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    KEEP: tl.constexpr,
    TOP_IDS: tl.constexpr,
    MARKED: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
):
    first_row, first_id = row_tile * ROWS, id_tile * IDS
    z = _products(hidden, weight, first_row, first_id, num_rows, vocab, DIM, ROWS, IDS, DEPTH, TMA)
    rows, ids = first_row + tl.arange(0, ROWS), first_id + tl.arange(0, IDS)
    has_row = rows < num_rows
    offset = tl.load(offsets + rows, mask=has_row, other=0.0)
    exponent = z * _LOG2_E - offset[:, None]
    if not WHOLE_TILES:
        exponent = tl.where((ids < vocab)[None, :], exponent, -float("inf"))
    place = (tl.zeros((ROWS,), tl.int64) + id_tile) * num_rows + rows
    if TOP_IDS:
        top, best = tl.max(exponent, axis=1, return_indices=True)
        tl.store(top_ids + place, first_id + best, mask=has_row)
    else:
        top = tl.max(exponent, axis=1)
    tl.store(tops + place, top, mask=has_row)
    e = tl.exp2(exponent)
    if MARKED:
        words = marks + rows[:, None].to(tl.int64) * mark_stride + (ids // 32)[None, :]
        word = tl.load(words, mask=has_row[:, None] & (ids < vocab)[None, :], other=0)
        e = tl.where(((word >> (ids % 32)[None, :]) & 1) != 0, 0.0, e)
    tl.store(sums + place, tl.sum(e, axis=1), mask=has_row)
    if KEEP:
        # The tile's corner in 64 bits, places in the tile in 32: 128 rows x 201,088 ids fit.
        corner = exps + first_row * exp_stride.to(tl.int64) + first_id
        inside = tl.arange(0, ROWS)[:, None] * exp_stride + tl.arange(0, IDS)[None, :]
        stored = has_row[:, None] & (ids < vocab)[None, :]
        tl.store(corner + inside, e.to(tl.bfloat16), mask=stored)


@triton.jit
def _exp_kernel(
    hidden,
    weight,
    offsets,
    exps,
    sums,
    tops,
    top_ids,
    marks,
    num_rows,
    vocab,
    exp_stride,
    mark_stride,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    KEEP: tl.constexpr,
    TOP_IDS: tl.constexpr,
    MARKED: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    LOOP: tl.constexpr,
):
    # Blocks of rows run fastest: the chunk's hidden states (8 MB at 4096 x 1024) stay in the L2 cache, and each row of
    # the weight (412 MB) comes from memory once a chunk.
    row_tiles = tl.cdiv(num_rows, ROWS)
    if LOOP:
        num_tiles = row_tiles * tl.cdiv(vocab, IDS)
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            _exp_tile(
                *(hidden, weight, offsets, exps, sums, tops, top_ids, marks),
                *(num_rows, vocab, exp_stride, mark_stride, tile % row_tiles, tile // row_tiles),
                *(DIM, ROWS, IDS, DEPTH, TMA, KEEP, TOP_IDS, MARKED, WHOLE_TILES),
            )
    else:
        tile = tl.program_id(0)
        _exp_tile(
            *(hidden, weight, offsets, exps, sums, tops, top_ids, marks),
            *(num_rows, vocab, exp_stride, mark_stride, tile % row_tiles, tile // row_tiles),
            *(DIM, ROWS, IDS, DEPTH, TMA, KEEP, TOP_IDS, MARKED, WHOLE_TILES),
        )


@triton.jit
def _exp_again_kernel(
    hidden,
    weight,
    offsets,
    exps,
    sums,
    tops,
    top_ids,
    marks,
    flags,
    num_rows,
    vocab,
    exp_stride,
    mark_stride,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    KEEP: tl.constexpr,
    TOP_IDS: tl.constexpr,
    MARKED: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
):
    row_tile = tl.program_id(0)
    if tl.load(flags + row_tile) != 0:
        for id_tile in range(tl.program_id(1), tl.cdiv(vocab, IDS), tl.num_programs(1)):
            _exp_tile(
                *(hidden, weight, offsets, exps, sums, tops, top_ids, marks),
                *(num_rows, vocab, exp_stride, mark_stride, row_tile, id_tile),
                *(DIM, ROWS, IDS, DEPTH, TMA, KEEP, TOP_IDS, MARKED, WHOLE_TILES),
            )
