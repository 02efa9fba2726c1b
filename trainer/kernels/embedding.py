"""The gradient of an embedding added to its fp32 sums by one Triton kernel, over the rows that occur alone.

torch makes a whole gradient [V, D], and Megatron's hook adds it: 1.14 ms a micro-batch of 32,768 tokens at V = 201,088,
D = 1024. Tokens are sorted by id (stable); a program adds up the rows of each id that
begins among its tokens, in their order, and adds the sum once. No atomics: two runs give the same bits.

Shapes: T tokens, V ids, D hidden size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class EmbeddingConfig(NamedTuple):
    """Sorted tokens of a program, columns of D, rows added at a time, warps."""

    tokens: int
    cols: int
    rows: int
    warps: int


EMBEDDING = EmbeddingConfig(tokens=8, cols=256, rows=16, warps=4)


def add_rows(
    sums_VD: torch.Tensor,
    grad_TD: torch.Tensor,
    ids_T: torch.Tensor,
    config: EmbeddingConfig = EMBEDDING,
) -> None:
    """sums[ids[t]] += grad[t] for every t, in fp32. sums fp32, grad any floating dtype, both contiguous; ids int64."""
    T, D = grad_TD.shape
    sorted_T, order_T = ids_T.sort(stable=True)
    cols = math.gcd(config.cols, D)
    _add_rows_kernel[(triton.cdiv(T, config.tokens), D // cols)](
        *(sums_VD, grad_TD, sorted_T, order_T, T, D, config.tokens, cols, config.rows),
        num_warps=config.warps,
    )


@triton.jit(do_not_specialize=["T"])
def _add_rows_kernel(
    sums,
    grad,
    ids,
    order,
    T,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    for number in range(TOKENS):
        first = tl.program_id(0) * TOKENS + number
        own = tl.load(ids + first, mask=first < T, other=-1)
        before = tl.load(ids + first - 1, mask=(first > 0) & (first < T), other=-1)
        if own != before:
            n = first + tl.arange(0, ROWS)
            same = tl.load(ids + n, mask=n < T, other=-1) == own
            total = tl.zeros((ROWS, COLS), tl.float32)
            left = tl.sum(same.to(tl.int32), axis=0)
            while left > 0:
                row = tl.load(order + n, mask=same, other=0)
                cells = row[:, None] * D + d[None, :]
                total += tl.load(grad + cells, mask=same[:, None], other=0.0).to(tl.float32)
                n += ROWS
                same = tl.load(ids + n, mask=n < T, other=-1) == own
                left = tl.sum(same.to(tl.int32), axis=0)
            places = sums + own * D + d
            tl.store(places, tl.load(places) + tl.sum(total, axis=0))
