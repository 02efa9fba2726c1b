"""Gradients of the routed experts (experts.py) as Triton kernels. g is the gradient of the output.

`inner` reads the rows of g by index: inner = g W2, d_gate = inner . relu(z)^2 + g . b2, dz = inner * gate * 2 relu(z),
and writes h = gate * relu(z)^2 once more, so that both weight gradients are plain products of rows:
`outer` gives dW1 = dz' x and dW2 = g' h with the sums that are the biases' gradients, one program for each expert and
block of D: an expert without rows writes zeros. `rows` is dx_ND = dz W1, and `sum_slots` its sum over slots.
Bytes at T = 32768, K = 4, D = 1024, F = 128: `inner` 404 MB, `rows` 369 MB, `outer` 369 MB each, of which gathered
rows are 268 MB (67 MB different ones).

Shapes: T tokens, K slots of each, N = T K slots sorted by expert, E experts, D hidden size, F expert width, L tiles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trainer.kernels.dispatch import Slots, TileMaps, known_tiles, sum_slots, tile_rows


class InnerConfig(NamedTuple):
    """Rows of a tile, columns of D a step, warps, stages of the pipeline."""

    rows: int
    step: int
    warps: int
    stages: int


class RowsConfig(NamedTuple):
    """Rows of a tile, columns of D a step, programs that share a tile's columns, warps, stages."""

    rows: int
    cols: int
    split: int
    warps: int
    stages: int


class OuterConfig(NamedTuple):
    """Columns of D a program, rows a step, warps, stages."""

    cols: int
    step: int
    warps: int
    stages: int


INNER = InnerConfig(rows=64, step=64, warps=8, stages=3)
ROWS = RowsConfig(rows=128, cols=64, split=1, warps=8, stages=3)
# (64, 64, 4, 3) is a quarter faster, and on an H200 with Triton 3.6 it gave other bits from run to run: a race that the
# compiler makes. A new choice here has to pass tests/gpu/test_moe_kernels.py.
OUTER = OuterConfig(cols=128, step=32, warps=8, stages=5)


def gradients(
    g_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    z_NF: torch.Tensor,
    slots: Slots,
    fc1_EFD: torch.Tensor,
    bias1_EF: torch.Tensor,
    fc2_EDF: torch.Tensor,
    bias2_ED: torch.Tensor,
    known: TileMaps | None = None,
) -> tuple[torch.Tensor, ...]:
    """Of x, gates (fp32), fc1, bias1, fc2, bias2, each of its own dtype; all arguments contiguous, T > 0."""
    gates_grad, dz_NF, h_NF, gate_N = inner(
        g_TD, gates_TK, z_NF, slots, fc2_EDF, bias2_ED, known=known
    )
    x_grad = sum_slots(rows(dz_NF, slots, fc1_EFD, known=known), slots.place_TK, None)
    fc1_grad, bias1_grad = outer(dz_NF, x_TD, slots, fc1_EFD, bias1_EF, None)
    fc2_grad, bias2_grad = outer(h_NF, g_TD, slots, fc2_EDF, bias2_ED, gate_N)
    return x_grad, gates_grad, fc1_grad, bias1_grad, fc2_grad, bias2_grad


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
    """d_gates_TK fp32; dz_NF and h_NF = gate * relu(z)^2, bf16; gate_N fp32, the gates in the order of slots."""
    (_, D, F), N, K = fc2_EDF.shape, z_NF.shape[0], gates_TK.shape[1]
    gates_grad, dz_NF, h_NF = (torch.empty_like(t) for t in (gates_TK, z_NF, z_NF))
    gate_N = gates_TK.new_empty(N)
    expert_L, start_L = known_tiles(slots, config.rows, known)
    _inner_kernel[(expert_L.numel(),)](
        *(g_TD, gates_TK, z_NF, fc2_EDF, bias2_ED, slots.order_N, slots.ends_E),
        *(expert_L, start_L, gates_grad, dz_NF, h_NF, gate_N),
        *(K, D, F, config.rows, math.gcd(config.step, D)),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return gates_grad, dz_NF, h_NF, gate_N


@triton.jit
def _inner_kernel(
    g,
    gates,
    z,
    weight,
    bias,
    order,
    ends,
    tile_expert,
    tile_start,
    gates_grad,
    dz,
    h,
    sorted_gates,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    n, held = tile_rows(tile_start, ends, tile, expert, BLOCK_M)
    slot = tl.load(order + held)
    f, d = tl.arange(0, F), tl.arange(0, BLOCK_D)
    g_rows = g + (slot // K).to(tl.int64)[:, None] * D + d[None, :]
    w_rows = weight + expert * D * F + d[:, None] * F + f[None, :]
    biases = bias + expert * D + d
    total = tl.zeros((BLOCK_M, F), tl.float32)
    by_bias = tl.zeros((BLOCK_M,), tl.float32)
    b = tl.load(biases)
    for first in range(0, D, BLOCK_D):
        g_tile = tl.load(g_rows + first)
        total = tl.dot(g_tile, tl.load(w_rows + first * F), total)
        by_bias += tl.sum(g_tile.to(tl.float32) * b.to(tl.float32)[None, :], axis=1)
        # Loaded a step before it is used: the pipeline holds only what enters a product. The last is not used.
        b = tl.load(biases + (first + BLOCK_D) % D)
    gate = tl.load(gates + slot)
    cells = n.to(tl.int64)[:, None] * F + f[None, :]
    inside = (n == held)[:, None]
    positive = tl.maximum(tl.load(z + cells, mask=inside, other=0.0).to(tl.float32), 0.0)
    squared = positive * positive
    # Each slot stands once in the order, so each gate's gradient is written once.
    tl.store(sorted_gates + n, gate, mask=n == held)
    tl.store(gates_grad + slot, tl.sum(total * squared, axis=1) + by_bias, mask=n == held)
    z_grad = total * (2.0 * gate[:, None] * positive)
    tl.store(dz + cells, z_grad.to(dz.dtype.element_ty), mask=inside)
    tl.store(h + cells, (squared * gate[:, None]).to(h.dtype.element_ty), mask=inside)


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
    z_grad = tl.load(dz + held.to(tl.int64)[:, None] * F + f[None, :])
    w_rows = weight + expert * F * D + f[:, None] * D + d[None, :]
    places = dx + n.to(tl.int64)[:, None] * D + d[None, :]
    begin = tl.program_id(0) % SPLIT * (D // SPLIT)
    for first in range(begin, begin + D // SPLIT, BLOCK_D):
        out = tl.dot(z_grad, tl.load(w_rows + first))
        tl.store(places + first, out.to(dx.dtype.element_ty), mask=(n == held)[:, None])


def outer(
    narrow_NF: torch.Tensor,
    wide_TD: torch.Tensor,
    slots: Slots,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gate_N: torch.Tensor | None,
    config: OuterConfig = OUTER,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a weight and its bias, shapes and dtypes theirs: sums over the rows n of each expert.

    Without gates narrow[n]' wide[token of n], [E, F, D], and the sum of narrow, [E, F]; with them the transpose,
    [E, D, F], and the sum of gate * wide, [E, D].
    """
    (F, D), K, E = (narrow_NF.shape[1], wide_TD.shape[1]), slots.place_TK.shape[1], weight.shape[0]
    weight_grad, bias_grad = torch.empty_like(weight), torch.empty_like(bias)
    cols = math.gcd(config.cols, D)
    _outer_kernel[(E * (D // cols),)](
        *(narrow_NF, wide_TD, narrow_NF if gate_N is None else gate_N, slots.order_N),
        *(slots.rows_E, slots.ends_E, weight_grad, bias_grad),
        *(gate_N is not None, K, D, F, config.step, cols),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return weight_grad, bias_grad


@triton.jit
def _outer_kernel(
    narrow,
    wide,
    gates,
    order,
    rows_of,
    ends,
    weight_grad,
    bias_grad,
    GATED: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    expert = tl.program_id(0) // (D // BLOCK_D)
    block = tl.program_id(0) % (D // BLOCK_D)
    end = tl.load(ends + expert)
    begin = end - tl.load(rows_of + expert)
    f, d = tl.arange(0, F), block * BLOCK_D + tl.arange(0, BLOCK_D)
    if GATED:
        total = tl.zeros((BLOCK_D, F), tl.float32)
        sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        total = tl.zeros((F, BLOCK_D), tl.float32)
        sums = tl.zeros((BLOCK_N, F), tl.float32)
    n = begin + tl.arange(0, BLOCK_N)
    token = tl.load(order + n, mask=n < end, other=0) // K
    if GATED:
        gate = tl.load(gates + n, mask=n < end, other=0.0)
    for _ in range(begin, end, BLOCK_N):
        inside = (n < end)[:, None]
        a = tl.load(narrow + n.to(tl.int64)[:, None] * F + f[None, :], mask=inside, other=0.0)
        b = tl.load(wide + token.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
        # Sums of the biases stay apart row by row until the end: no reduction across warps inside the loop.
        if GATED:
            total = tl.dot(tl.trans(b), a, total)
            sums += gate[:, None] * b.to(tl.float32)
        else:
            total = tl.dot(tl.trans(a), b, total)
            sums += a.to(tl.float32)
        # Loaded a step before they are used: an index inside the pipeline would cost it a stage.
        n += BLOCK_N
        token = tl.load(order + n, mask=n < end, other=0) // K
        if GATED:
            gate = tl.load(gates + n, mask=n < end, other=0.0)
    bias_sum = tl.sum(sums, axis=0).to(bias_grad.dtype.element_ty)
    base = weight_grad + expert.to(tl.int64) * D * F
    if GATED:
        places = base + d[:, None] * F + f[None, :]
        tl.store(bias_grad + expert * D + d, bias_sum)
    else:
        places = base + f[:, None] * D + d[None, :]
        if block == 0:
            tl.store(bias_grad + expert * F + f, bias_sum)
    tl.store(places, total.to(weight_grad.dtype.element_ty))
