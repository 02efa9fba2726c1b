"""The gradient of relu^2, its value once more, and the gradient's sum over tokens, in one kernel.

Two tensors are read and two written, 134 MB at T = 32768, W = 512; the sum is made on the way, in fp32, a program's
tokens in registers and the programs by torch, in a fixed order: two runs give the same bits.

Shapes: T tokens, W width of the MLP, P programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class ReluConfig(NamedTuple):
    """Tokens at a time, how often, and warps of a program."""

    tokens: int
    steps: int
    warps: int


RELU = ReluConfig(tokens=2, steps=16, warps=2)


def relu_squared_gradients(
    grad_TW: torch.Tensor, inner_TW: torch.Tensor, config: ReluConfig = RELU
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of inner; relu(inner)^2; the gradient's sum over tokens, fp32 [W]) from the gradient of relu(inner)^2.

    Both contiguous and of one dtype, bf16 or fp32, as are the first two results.
    """
    T, W = inner_TW.shape
    programs = triton.cdiv(T, config.tokens * config.steps)
    out_TW, squared_TW = torch.empty_like(inner_TW), torch.empty_like(inner_TW)
    sums_PW = inner_TW.new_empty(programs, W, dtype=torch.float32)
    _relu_kernel[(programs,)](
        *(grad_TW, inner_TW, out_TW, squared_TW, sums_PW, T),
        *(W, triton.next_power_of_2(W), *config[:2]),
        num_warps=config.warps,
    )
    return out_TW, squared_TW, sums_PW.sum(dim=0)


@triton.jit(do_not_specialize=["T"])
def _relu_kernel(
    grad,
    inner,
    out,
    squared,
    sums,
    T,
    W: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    w = tl.arange(0, WIDTH)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    first = tl.program_id(0) * STEPS
    cells, inside = _cells(first, T, W, WIDTH, BLOCK)
    ahead_inner = tl.load(inner + cells, mask=inside, other=0.0)
    ahead_grad = tl.load(grad + cells, mask=inside, other=0.0)
    for step in range(STEPS):
        positive, g = tl.maximum(ahead_inner.to(tl.float32), 0.0), ahead_grad.to(tl.float32)
        cells, inside = _cells(first + step + 1, T, W, WIDTH, BLOCK)
        inside = inside & (step + 1 < STEPS)
        ahead_inner = tl.load(inner + cells, mask=inside, other=0.0)
        ahead_grad = tl.load(grad + cells, mask=inside, other=0.0)
        g *= positive * 2.0
        cells, inside = _cells(first + step, T, W, WIDTH, BLOCK)
        tl.store(out + cells, g.to(out.dtype.element_ty), mask=inside)
        tl.store(squared + cells, (positive * positive).to(out.dtype.element_ty), mask=inside)
        total += g
    tl.store(sums + tl.program_id(0) * W + w, tl.sum(total, axis=0), mask=w < W)


@triton.jit
def _cells(block, T, W: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    t, w = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    return t.to(tl.int64)[:, None] * W + w[None, :], (t < T)[:, None] & (w < W)[None, :]
