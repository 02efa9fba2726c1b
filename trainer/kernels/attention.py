"""Attention of packed rows as Triton kernels: causal within documents, window or ALiBi, a learnable sink of every head.

Position i of row b sees j where low_BS[b, i] <= j <= i. With s_ij = scale q_i . k_j - m_h (i - j), m_h = 0 without
ALiBi and else 2^(-8 (h + 1) / H) (arXiv 2108.12409), and the sink b_h: out_i = sum_j exp(s_ij) v_j / (exp(b_h) +
sum_j exp(s_ij)). `trainer.megatron.attention.dense_attention` is the reference.

A program takes a block of rows, a few queries of all heads of one key-value head, and walks the blocks of keys from low
of its first query to its last: keys are read once for all of these heads, and by few queries a window is left soon. The
sink starts the running maximum and the running sum (at 1), so no row is without a finite maximum. Scores are in units
of q . k until the exponent, which is one multiply-add: exp2(s * scale * log2(e) - maximum). The part of the ALiBi bias
that depends on i alone, m_h (i - start), is left out of the scores and added to the sink instead: one multiply-add a
pair. Where a launch is `split`, the blocks that every query of the program sees whole are walked apart, without a mask.
bf16 products, fp32 sums, no atomics: two runs give the same bits. Nothing waits for the device.

Shapes: S positions, B rows, H query heads, G key-value heads, C head dim, P programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from common.errors import ConfigError
from trainer.kernels import attention_backward as backward_kernels
from trainer.kernels.attention_backward import (
    LOG2E,
    Launch,
    alibi_slope,
    block_rows,
    key_walk,
)


class Launches(NamedTuple):
    """How the three kernels are launched: forward, gradient of queries, gradients of keys and values."""

    forward: Launch
    queries: Launch
    keys: Launch


# Four warps on 64 queries: more programs of a multiprocessor at once were worth more than larger tiles, on an H200
# (benchmarks/attention.py).
WINDOW = Launches(
    forward=Launch(rows=64, keys=32, warps=4, stages=3),
    queries=Launch(rows=64, keys=32, warps=4, stages=2),
    keys=Launch(rows=64, keys=64, warps=4, stages=2),
)
FULL = Launches(
    forward=Launch(rows=64, keys=32, warps=4, stages=3, split=True),
    queries=Launch(rows=64, keys=64, warps=4, stages=2),
    keys=Launch(rows=32, keys=64, warps=4, stages=3),
)


def attention(
    q_SBHC: torch.Tensor,
    k_SBGC: torch.Tensor,
    v_SBGC: torch.Tensor,
    sink_H: torch.Tensor,
    low_BS: torch.Tensor,
    high_BS: torch.Tensor,
    *,
    window: int | None,
    alibi: bool,
    scale: float,
) -> torch.Tensor:
    """[S, B, H, C] bf16, contiguous: see the top of this file; with gradients of q, k, v and sink.

    q, k, v: bf16, any strides with the last axis contiguous; H a multiple of G, head h reads key-value head
    h // (H / G); C a power of two in 16 .. 128. sink: bf16 or fp32, its gradient likewise. low_BS and high_BS, int32:
    `trainer.megatron.attention.visible_range` of the same window, which here chooses the launch alone. scale above 0.
    ConfigError: anything else.
    """
    _check(q_SBHC, k_SBGC, v_SBGC, sink_H, low_BS, high_BS, scale)
    return _Attention.apply(q_SBHC, k_SBGC, v_SBGC, sink_H, low_BS, high_BS, window, alibi, scale)


def _check(
    q_SBHC: torch.Tensor,
    k_SBGC: torch.Tensor,
    v_SBGC: torch.Tensor,
    sink_H: torch.Tensor,
    low_BS: torch.Tensor,
    high_BS: torch.Tensor,
    scale: float,
) -> None:
    remedy = "train in bf16 with such heads, or attend by another way"
    dtypes = [t.dtype for t in (q_SBHC, k_SBGC, v_SBGC, low_BS, high_BS)]
    sinks = (torch.bfloat16, torch.float32)
    if dtypes != [torch.bfloat16] * 3 + [torch.int32] * 2 or sink_H.dtype not in sinks:
        raise ConfigError(
            "The attention kernels cannot take these dtypes of q, k, v, low, high and sink",
            got=[*dtypes, sink_H.dtype],
            expected="bfloat16, low and high int32, sink bfloat16 or float32",
            remedy=remedy,
        )
    (S, B, H, C), G = q_SBHC.shape, k_SBGC.shape[2]
    shapes = [tuple(t.shape) for t in (k_SBGC, v_SBGC, sink_H, low_BS, high_BS)]
    fits = shapes == [(S, B, G, C), (S, B, G, C), (H,), (B, S), (B, S)] and H % G == 0
    if not fits or C not in (16, 32, 64, 128) or 0 in (S, B):
        raise ConfigError(
            "The attention kernels cannot take these shapes of q, k, v, sink, low and high",
            got=[tuple(q_SBHC.shape), *shapes],
            expected="[S, B, H, C], [S, B, G, C] twice, [H], [B, S] twice; G divides H, C 16 .. 128",
            remedy=remedy,
        )
    strides = [t.stride(-1) for t in (q_SBHC, k_SBGC, v_SBGC, sink_H)]
    if strides != [1] * 4 or not (low_BS.is_contiguous() and high_BS.is_contiguous()):
        raise ConfigError(
            "The attention kernels cannot take these strides of the last axis of q, k, v and sink",
            got=strides,
            expected="1, and low and high contiguous",
            remedy="hand over contiguous tensors",
        )
    if not scale > 0:
        raise ConfigError(
            "The attention kernels cannot take this scale", got=scale, expected="above 0"
        )


class _Attention(torch.autograd.Function):
    """See attention."""

    @staticmethod
    def forward(
        ctx: Any,
        q_SBHC: torch.Tensor,
        k_SBGC: torch.Tensor,
        v_SBGC: torch.Tensor,
        sink_H: torch.Tensor,
        low_BS: torch.Tensor,
        high_BS: torch.Tensor,
        window: int | None,
        alibi: bool,
        scale: float,
    ) -> torch.Tensor:
        inputs = (q_SBHC, k_SBGC, v_SBGC, sink_H, low_BS)
        out_SBHC, lse_BHS = attend(*inputs, window=window, alibi=alibi, scale=scale)
        ctx.save_for_backward(*inputs, high_BS, out_SBHC, lse_BHS)
        ctx.window, ctx.alibi, ctx.scale = window, alibi, scale
        return out_SBHC

    @staticmethod
    def backward(ctx: Any, grad_SBHC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = gradients(
            grad_SBHC, *ctx.saved_tensors, window=ctx.window, alibi=ctx.alibi, scale=ctx.scale
        )
        return (*grads, None, None, None, None, None)


def attend(
    q_SBHC: torch.Tensor,
    k_SBGC: torch.Tensor,
    v_SBGC: torch.Tensor,
    sink_H: torch.Tensor,
    low_BS: torch.Tensor,
    *,
    window: int | None,
    alibi: bool,
    scale: float,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_SBHC, lse_BHS) without gradients; lse fp32, the sink included, in units of log 2 (exp2 gives the sum)."""
    (S, B, H, C), G = q_SBHC.shape, k_SBGC.shape[2]
    of = launch or (FULL if window is None else WINDOW).forward
    out_SBHC = torch.empty(S, B, H, C, dtype=q_SBHC.dtype, device=q_SBHC.device)
    lse_BHS = torch.empty(B, H, S, dtype=torch.float32, device=q_SBHC.device)
    turns = triton.next_power_of_2(H // G)
    _forward_kernel[(triton.cdiv(S, of.rows // turns) * B * G,)](
        *(q_SBHC, k_SBGC, v_SBGC, sink_H, low_BS, out_SBHC, lse_BHS),
        *(*q_SBHC.stride()[:3], *k_SBGC.stride()[:3], *v_SBGC.stride()[:3]),
        *(S, B, float(scale), H, G, C, turns, of.rows, of.keys, alibi, of.split),
        num_warps=of.warps,
        num_stages=of.stages,
    )
    return out_SBHC, lse_BHS


def gradients(
    grad_SBHC: torch.Tensor,
    q_SBHC: torch.Tensor,
    k_SBGC: torch.Tensor,
    v_SBGC: torch.Tensor,
    sink_H: torch.Tensor,
    low_BS: torch.Tensor,
    high_BS: torch.Tensor,
    out_SBHC: torch.Tensor,
    lse_BHS: torch.Tensor,
    *,
    window: int | None,
    alibi: bool,
    scale: float,
    launches: Launches | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v [S, B, ., C], contiguous, in their dtype, and of the sink; out and lse from `attend`."""
    of = launches or (FULL if window is None else WINDOW)
    how: dict[str, Any] = {"alibi": alibi, "scale": scale}
    grad_SBHC, inputs = grad_SBHC.contiguous(), (q_SBHC, k_SBGC, v_SBGC)
    q_grad, delta_BHS, sink_grad = backward_kernels.query_gradients(
        grad_SBHC, *inputs, sink_H, low_BS, out_SBHC, lse_BHS, **how, launch=of.queries
    )
    k_grad, v_grad = backward_kernels.key_gradients(
        grad_SBHC, *inputs, high_BS, lse_BHS, delta_BHS, **how, launch=of.keys
    )
    return q_grad, k_grad, v_grad, sink_grad


@triton.jit
def _forward_kernel(
    q, k, v, sink, low, out, lse, q_s, q_b, q_h, k_s, k_b, k_g, v_s, v_b, v_g, S, B, scale,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, TURNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIBI: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    b, start, i, head, live = block_rows(S, H, G, TURNS, BLOCK_M)
    group, c = (tl.program_id(0) % G).to(tl.int64), tl.arange(0, C)
    held = tl.minimum(i, S - 1)
    wide, line = held.to(tl.int64)[:, None], (b * H + head) * S + i
    q_tile = tl.load(q + b * q_b + head[:, None] * q_h + wide * q_s + c[None, :])
    k_row = k + b * k_b + group * k_g + c[None, :]
    v_row = v + b * v_b + group * v_g + c[None, :]
    low_i = tl.load(low + b * S + held)
    begin, whole, before, jump, count = key_walk(
        low + b * S, start, S, BLOCK_M // TURNS, BLOCK_N, SPLIT
    )
    slope = alibi_slope(head, H, ALIBI)
    shift = slope * LOG2E * (i - start).to(tl.float32)
    top = tl.load(sink + head).to(tl.float32) * LOG2E + shift
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    acc = tl.zeros((BLOCK_M, C), tl.float32)
    if SPLIT:
        acc, total, top = _sweep(
            *(acc, total, top, q_tile, k_row, v_row, k_s, v_s, i, low_i, start, whole),
            *(jump // BLOCK_N, 0, 0, S, scale, slope, ALIBI, False, BLOCK_N),
        )
    acc, total, top = _sweep(
        *(acc, total, top, q_tile, k_row, v_row, k_s, v_s, i, low_i, start, begin),
        *(count, before, jump, S, scale, slope, ALIBI, True, BLOCK_N),
    )
    place = out + ((wide * B + b) * H + head[:, None]) * C + c[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=live[:, None])
    tl.store(lse + line, top + tl.log2(total) - shift, mask=live)


@triton.jit
def _sweep(
    acc,
    total,
    top,
    q_tile,
    k_row,
    v_row,
    k_s,
    v_s,
    i,
    low_i,
    start,
    begin,
    count,
    before,
    jump,
    S,
    scale,
    slope,
    ALIBI: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums after `count` blocks of keys from `begin` on; after `before` of them `jump` positions are left out."""
    n = tl.arange(0, BLOCK_N)
    for step in range(count):
        at = begin + step * BLOCK_N
        inner = n
        if MASKED:
            at += tl.where(step >= before, jump, 0)
            inner = tl.minimum(n, S - 1 - at)
        j = at + n
        k_tile = tl.load(k_row + at.to(tl.int64) * k_s + inner[:, None] * k_s)
        s = tl.dot(q_tile, tl.trans(k_tile))
        if ALIBI:
            s += (slope / scale)[:, None] * (j - start).to(tl.float32)[None, :]
        if MASKED:
            seen = (j[None, :] <= i[:, None]) & (j[None, :] >= low_i[:, None])
            s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
        p = tl.exp2(s * (scale * LOG2E) - new[:, None])
        keep = tl.exp2(top - new)
        total = total * keep + tl.sum(p, 1)
        v_tile = tl.load(v_row + at.to(tl.int64) * v_s + inner[:, None] * v_s)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * keep[:, None])
        top = new
    return acc, total, top
