"""Gradients of many parameters, added to their fp32 sums by one Triton kernel.

Added one parameter at a time, as a backward hook does, the dense gradients of a layer of the full student are some 20
launches of 6 us where their bytes (10 a weight) take 15 us in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from common.errors import ConfigError

_BLOCK, _WARPS = 8192, 8  # values a program: 64 KiB of sums


class Accumulation:
    """sums[i] += grads[i], every time `add` is called; addresses are taken once.

    sums: contiguous fp32 on one device. grads: contiguous, of the same shapes, bf16 or fp32; both are held. Each value
    is added once, in fp32, as `sum.add_(grad)` does. ConfigError: anything else.
    """

    def __init__(self, sums: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
        for total, grad in zip(sums, grads, strict=True):
            _check(total, grad)
        self._held = (list(sums), list(grads))
        halves = [pair for pair in zip(sums, grads, strict=True) if pair[1].dtype == torch.bfloat16]
        wholes = [pair for pair in zip(sums, grads, strict=True) if pair[1].dtype == torch.float32]
        self._wholes = [list(of) for of in zip(*wholes, strict=True)]
        rows = [row for pair in halves for row in _blocks(*pair)]
        self._blocks = len(rows)
        self._aligned = all(address % 16 == 0 for row in rows for address in row[:2])
        device = sums[0].device if sums else None
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)

    def add(self) -> None:
        """Enqueue the additions on the current stream."""
        if self._blocks:
            _add_kernel[(self._blocks,)](self._table, self._aligned, _BLOCK, num_warps=_WARPS)
        if self._wholes:
            torch._foreach_add_(*self._wholes)


def _check(total: torch.Tensor, grad: torch.Tensor) -> None:
    fits = total.dtype == torch.float32 and grad.dtype in (torch.bfloat16, torch.float32)
    fits = fits and total.shape == grad.shape and total.device == grad.device
    if not (fits and total.is_contiguous() and grad.is_contiguous()):
        raise ConfigError(
            "The kernel that adds up gradients cannot take this pair",
            got=[(t.dtype, tuple(t.shape), t.stride(), str(t.device)) for t in (total, grad)],
            expected="sum fp32, gradient bf16 or fp32, one shape, contiguous, one device",
            remedy="set cuda_graph=false",
        )


def _blocks(total: torch.Tensor, grad: torch.Tensor) -> list[tuple[int, int, int]]:
    """(address of the sums, of the gradients, how many) of each program."""
    starts = range(0, total.numel(), _BLOCK)
    return [
        (total.data_ptr() + 4 * at, grad.data_ptr() + 2 * at, min(_BLOCK, total.numel() - at))
        for at in starts
    ]


@triton.jit
def _add_kernel(table, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = table + tl.program_id(0) * 3
    total = tl.load(row).to(tl.pointer_type(tl.float32))
    grad = tl.load(row + 1).to(tl.pointer_type(tl.bfloat16))
    count = tl.load(row + 2)
    if ALIGNED:
        total, grad = tl.multiple_of(total, 16), tl.multiple_of(grad, 16)
    at = tl.arange(0, BLOCK)
    # Whole blocks without a mask: four values a load.
    if count == BLOCK:
        tl.store(total + at, tl.load(total + at) + tl.load(grad + at).to(tl.float32))
    else:
        mask = at < count
        value = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + at, tl.load(total + at, mask=mask, other=0.0) + value, mask=mask)
