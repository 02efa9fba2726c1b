"""Gradients of the routed experts (experts.py) as Triton kernels. g is the gradient of the output.

`inner` reads the rows of g by index: inner = g W2, d_gate = inner . relu(z)^2 + g . b2, dz = inner * gate * 2 relu(z),
and writes h = gate * relu(z)^2 once more, so that both weight gradients are plain products of rows (experts_outer.py).
`rows` is dx_ND = dz W1, which is left to be summed over slots.
Bytes at T = 32768, K = 4, D = 1024, F = 128: `inner` 404 MB, `rows` 369 MB, of which gathered rows are 268 MB (67 MB
different ones).

A tile that enters a product is used for nothing else. Triton 3.6 gives a tile that is also read into registers one
buffer fewer, but not the asynchronous product that reads it: the next copy overwrites it meanwhile. So sums for the
biases are products too, with a narrow `side` [N, 16] of ones and gates, and so is g . b2, of 16 equal columns b2.
tests/trainer/test_kernel_buffers.py looks for such tiles in what is compiled.

Shapes: T tokens, K slots of each, N = T K slots sorted by expert, E experts, D hidden size, F expert width, L tiles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trainer.kernels.dispatch import Slots, TileMaps, into_registers, known_tiles, tile_rows


class InnerConfig(NamedTuple):
    """Rows of a tile, columns of D a step, warps, stages of the pipeline, the most registers of a thread."""

    rows: int
    step: int
    warps: int
    stages: int
    registers: int | None = None


class RowsConfig(NamedTuple):
    """Rows of a tile, columns of D a step, programs that share a tile's columns, warps, stages."""

    rows: int
    cols: int
    split: int
    warps: int
    stages: int


INNER = InnerConfig(rows=64, step=32, warps=4, stages=5, registers=168)
ROWS = RowsConfig(rows=64, cols=64, split=1, warps=4, stages=4)
SIDE = 16  # columns: the narrowest product. A slot has its gate in two bf16 parts, and 1.


def inner(
    g_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    z_NF: torch.Tensor,
    slots: Slots,
    fc2_EDF: torch.Tensor,
    bias2_ED: torch.Tensor,
    config: InnerConfig = INNER,
    known: TileMaps | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """d_gates_TK fp32; bf16: dz_NF, h_NF = gate * relu(z)^2, side_NC: the gate (high and low part), 1, and zeros."""
    (E, D, F), N, K = fc2_EDF.shape, z_NF.shape[0], gates_TK.shape[1]
    # Gates of experts elsewhere are not written.
    gates_grad = torch.empty_like(gates_TK) if slots.held_1 is None else torch.zeros_like(gates_TK)
    dz_NF, h_NF = torch.empty_like(z_NF), torch.empty_like(z_NF)
    side_NC = z_NF.new_empty(N, SIDE)
    # A product's width of equal columns: g . b2 is one more product of the rows of g, an eighth as wide.
    columns_EDC = bias2_ED.unsqueeze(2).expand(E, D, SIDE).contiguous()
    expert_L, start_L = known_tiles(slots, config.rows, known)
    _inner_kernel[(expert_L.numel(),)](
        *(g_TD, gates_TK, z_NF, fc2_EDF, columns_EDC, slots.order_N, slots.ends_E),
        *(expert_L, start_L, gates_grad, dz_NF, h_NF, side_NC),
        *(K, D, F, SIDE, config.rows, math.gcd(config.step, D)),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    return gates_grad, dz_NF, h_NF, side_NC


@triton.jit
def _inner_kernel(
    g,
    gates,
    z,
    weight,
    bias_columns,
    order,
    ends,
    tile_expert,
    tile_start,
    gates_grad,
    dz,
    h,
    side,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    n, held = tile_rows(tile_start, ends, tile, expert, BLOCK_M)
    slot = tl.load(order + held)
    token = (slot // K).to(tl.int64)
    f, d, c = tl.arange(0, F), tl.arange(0, BLOCK_D), tl.arange(0, SIDE)[None, :]
    g_rows = g + token[:, None] * D + d[None, :]
    w_rows = weight + expert * D * F + d[:, None] * F + f[None, :]
    b_rows = bias_columns + expert * D * SIDE + d[:, None] * SIDE + c
    total = tl.zeros((BLOCK_M, F), tl.float32)
    by_bias = tl.zeros((BLOCK_M, SIDE), tl.float32)
    for first in range(0, D, BLOCK_D):
        rows = tl.load(g_rows + first)
        total = tl.dot(rows, tl.load(w_rows + first * F), total)
        by_bias = tl.dot(rows, tl.load(b_rows + first * SIDE), by_bias)
    gate, own = tl.load(gates + slot), tl.sum(tl.where(c == 0, by_bias, 0.0), axis=1)
    wide, mine = n.to(tl.int64)[:, None], n == held
    inside = mine[:, None]
    # Half of the columns at a time: whole rows took 248 registers, and so one program less of a multiprocessor.
    halves = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, F // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        cells = wide * F + (half * (F // 2) + tl.arange(0, F // 2))[None, :]
        positive = tl.maximum(tl.load(z + cells, mask=inside, other=0.0).to(tl.float32), 0.0)
        squared = positive * positive
        own += tl.sum(halves[half] * squared, axis=1)
        z_grad = halves[half] * (2.0 * gate[:, None] * positive)
        tl.store(dz + cells, z_grad.to(dz.dtype.element_ty), mask=inside)
        tl.store(h + cells, (squared * gate[:, None]).to(h.dtype.element_ty), mask=inside)
    # Each slot stands once in the order, so each gate's gradient is written once.
    tl.store(gates_grad + slot, own, mask=mine)
    high = gate.to(side.dtype.element_ty).to(tl.float32)
    parts = tl.where(c == 0, high[:, None], tl.where(c == 1, (gate - high)[:, None], 0.0))
    parts = tl.where(c == 2, 1.0, parts)
    tl.store(side + wide * SIDE + c, parts.to(side.dtype.element_ty), mask=inside)


def rows(
    dz_NF: torch.Tensor,
    slots: Slots,
    fc1_EFD: torch.Tensor,
    config: RowsConfig = ROWS,
    known: TileMaps | None = None,
) -> torch.Tensor:
    """dx_ND bf16: dz W1 of each slot, in the order of slots."""
    (_, F, D), N = fc1_EFD.shape, dz_NF.shape[0]
    dx_ND = dz_NF.new_empty(N, D)
    expert_L, start_L = known_tiles(slots, config.rows, known)
    cols = math.gcd(config.cols, D)
    split = math.gcd(config.split, D // cols)
    _rows_kernel[(expert_L.numel() * split,)](
        *(dz_NF, fc1_EFD, slots.ends_E, expert_L, start_L, dx_ND),
        *(split, D, F, config.rows, cols),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dx_ND


@triton.jit
def _rows_kernel(
    dz,
    weight,
    ends,
    tile_expert,
    tile_start,
    dx,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0) // SPLIT
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    n, held = tile_rows(tile_start, ends, tile, expert, BLOCK_M)
    f, d = tl.arange(0, F), tl.arange(0, BLOCK_D)
    z_grad = into_registers(tl.load(dz + held.to(tl.int64)[:, None] * F + f[None, :]))
    z_grad = z_grad.to(dz.dtype.element_ty)
    w_rows = weight + expert * F * D + f[:, None] * D + d[None, :]
    places = dx + n.to(tl.int64)[:, None] * D + d[None, :]
    begin = tl.program_id(0) % SPLIT * (D // SPLIT)
    for first in range(begin, begin + D // SPLIT, BLOCK_D):
        out = tl.dot(z_grad, tl.load(w_rows + first))
        tl.store(places + first, out.to(dx.dtype.element_ty), mask=(n == held)[:, None])
