"""Gradients of trainer/kernels/attention.py, whose definitions hold here: two kernels that form the scores anew.

With p_ij = exp(s_ij - lse_i), lse_i the logarithm of the sum, sink included, dp_ij = dout_i . v_j and
delta_i = dout_i . out_i: ds_ij = p_ij (dp_ij - delta_i), dq_i = scale sum_j ds_ij k_j, dk_j = scale sum_i ds_ij q_i,
dv_j = sum_i p_ij dout_i (arXiv 2205.14135, appendix B.2) and dsink_h = -sum_i exp(sink_h - lse_i) delta_i.

A program of the first kernel walks keys as the forward pass does; it writes delta and its part of the sinks' gradients.
One of the second takes a block of keys of one key-value head and walks the queries of the group's heads that see it, up
to `high` of its last key, in one loop, so that the pipeline does not run dry between heads: seven products a pair
instead of five, but every sum in registers and in a fixed order, without atomics.

Shapes: S positions, B rows, H query heads, G key-value heads, C head dim, P programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Launch(NamedTuple):
    """Rows and keys of a tile, warps, stages of the pipeline. A row is a query of one head.

    split: blocks that are seen whole are walked apart, without a mask. turned: the kernel of keys forms its scores as
    keys by queries, so that p and ds enter the next products from registers, and lse and delta lie along a warp's rows;
    else as queries by keys, turned in shared memory.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    split: bool = False
    turned: bool = True


def query_gradients(
    grad_SBHC: torch.Tensor,
    q_SBHC: torch.Tensor,
    k_SBGC: torch.Tensor,
    v_SBGC: torch.Tensor,
    sink_H: torch.Tensor,
    low_BS: torch.Tensor,
    out_SBHC: torch.Tensor,
    lse_BHS: torch.Tensor,
    *,
    alibi: bool,
    scale: float,
    launch: Launch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q_grad_SBHC, delta_BHS fp32, sink_grad_H); grad and out contiguous."""
    (S, B, H, C), G = q_SBHC.shape, k_SBGC.shape[2]
    turns = triton.next_power_of_2(H // G)
    programs = triton.cdiv(S, launch.rows // turns) * B
    q_grad, delta_BHS = torch.empty_like(grad_SBHC), torch.empty_like(lse_BHS)
    sink_PH = lse_BHS.new_empty(programs, H)
    _query_kernel[(programs * G,)](
        *(grad_SBHC, q_SBHC, k_SBGC, v_SBGC, sink_H, low_BS, out_SBHC, lse_BHS),
        *(q_grad, delta_BHS, sink_PH),
        *(*q_SBHC.stride()[:3], *k_SBGC.stride()[:3], *v_SBGC.stride()[:3]),
        *(S, B, float(scale), H, G, C, turns, launch.rows, launch.keys, alibi, launch.split),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return q_grad, delta_BHS, sink_PH.sum(0).to(sink_H.dtype)


def key_gradients(
    grad_SBHC: torch.Tensor,
    q_SBHC: torch.Tensor,
    k_SBGC: torch.Tensor,
    v_SBGC: torch.Tensor,
    high_BS: torch.Tensor,
    lse_BHS: torch.Tensor,
    delta_BHS: torch.Tensor,
    *,
    alibi: bool,
    scale: float,
    launch: Launch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(k_grad_SBGC, v_grad_SBGC); grad contiguous, delta from `query_gradients`."""
    (S, B, H, C), G = q_SBHC.shape, k_SBGC.shape[2]
    k_grad = torch.empty(S, B, G, C, dtype=k_SBGC.dtype, device=k_SBGC.device)
    v_grad = torch.empty_like(k_grad)
    _key_kernel[(triton.cdiv(S, launch.keys) * B * G,)](
        *(grad_SBHC, q_SBHC, k_SBGC, v_SBGC, high_BS, lse_BHS, delta_BHS, k_grad, v_grad),
        *(*q_SBHC.stride()[:3], *k_SBGC.stride()[:3], *v_SBGC.stride()[:3]),
        *(
            S,
            B,
            float(scale),
            H,
            G,
            C,
            launch.rows,
            launch.keys,
            alibi,
            launch.split,
            launch.turned,
        ),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return k_grad, v_grad


@triton.jit
def alibi_slope(h, H: tl.constexpr, ALIBI: tl.constexpr):
    """2^(-8 (h + 1) / H), 0 without ALiBi; fp32."""
    return tl.exp2((h + 1).to(tl.float32) * (-8.0 / H)) if ALIBI else 0.0


@triton.jit
def block_rows(S, H: tl.constexpr, G: tl.constexpr, TURNS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(b, start, i, head, live) of the program's BLOCK_M rows: the positions from `start` on of row b, each for the
    H / G heads of one group side by side. TURNS: H / G up to a power of two; live: rows that are a query.
    """
    program, blocks = tl.program_id(0), tl.cdiv(S, BLOCK_M // TURNS)
    start = program // G % blocks * (BLOCK_M // TURNS)
    m = tl.arange(0, BLOCK_M)
    i, turn = start + m // TURNS, m % TURNS
    head = program % G * (H // G) + tl.minimum(turn, H // G - 1)
    b = (program // (G * blocks)).to(tl.int64)
    return b, start, i, head.to(tl.int64), (i < S) & (turn < H // G)


@triton.jit
def key_walk(low_S, start, S, POSITIONS: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr):
    """(begin, whole, before, jump, count): `count` blocks of keys from `begin` on are walked for POSITIONS queries from
    `start` on, and after `before` of them `jump` positions left out, which all of these see whole: with SPLIT, those
    from `whole` on, walked apart.
    """
    end = tl.minimum(start + POSITIONS, S)
    begin = tl.load(low_S + start) // BLOCK_N * BLOCK_N
    if SPLIT:
        whole_end = start // BLOCK_N * BLOCK_N
        whole = tl.minimum(tl.cdiv(tl.load(low_S + end - 1), BLOCK_N) * BLOCK_N, whole_end)
        before, jump = (whole - begin) // BLOCK_N, whole_end - whole
    else:
        whole, before, jump = begin, 0, 0
    return begin, whole, before, jump, tl.cdiv(end - begin - jump, BLOCK_N)


@triton.jit
def _query_kernel(
    grad, q, k, v, sink, low, out, lse, q_grad, delta, sink_grad, q_s, q_b, q_h, k_s, k_b, k_g,
    v_s, v_b, v_g, S, B, scale, H: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    TURNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIBI: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    b, start, i, head, live = block_rows(S, H, G, TURNS, BLOCK_M)
    group, c = (tl.program_id(0) % G).to(tl.int64), tl.arange(0, C)
    held = tl.minimum(i, S - 1)
    wide, line = held.to(tl.int64)[:, None], (b * H + head) * S + held
    place = ((wide * B + b) * H + head[:, None]) * C + c[None, :]
    q_tile = tl.load(q + b * q_b + head[:, None] * q_h + wide * q_s + c[None, :])
    grad_tile = tl.load(grad + place)
    delta_i = tl.sum(grad_tile.to(tl.float32) * tl.load(out + place).to(tl.float32), 1)
    tl.store(delta + line, delta_i, mask=live)
    lse_i = tl.load(lse + line)
    share = tl.exp2(tl.load(sink + head).to(tl.float32) * LOG2E - lse_i)
    sinks = tl.reshape(tl.where(live, share * delta_i, 0.0), (BLOCK_M // TURNS, TURNS))
    turn = tl.arange(0, TURNS)
    to = sink_grad + (tl.program_id(0) // G * H + tl.program_id(0) % G * (H // G)) + turn
    tl.store(to, -tl.sum(sinks, 0), mask=turn < H // G)
    k_row = k + b * k_b + group * k_g + c[None, :]
    v_row = v + b * v_b + group * v_g + c[None, :]
    low_i = tl.load(low + b * S + held)
    begin, whole, before, jump, count = key_walk(
        low + b * S, start, S, BLOCK_M // TURNS, BLOCK_N, SPLIT
    )
    slope = alibi_slope(head, H, ALIBI)
    lse_i += slope * LOG2E * (i - start).to(tl.float32)
    acc = tl.zeros((BLOCK_M, C), tl.float32)
    if SPLIT:
        acc = _sweep_keys(
            *(acc, q_tile, grad_tile, lse_i, delta_i, k_row, v_row, k_s, v_s, i, low_i, start),
            *(whole, jump // BLOCK_N, 0, 0, S, scale, slope, ALIBI, False, BLOCK_N),
        )
    acc = _sweep_keys(
        *(acc, q_tile, grad_tile, lse_i, delta_i, k_row, v_row, k_s, v_s, i, low_i, start, begin),
        *(count, before, jump, S, scale, slope, ALIBI, True, BLOCK_N),
    )
    tl.store(q_grad + place, (acc * scale).to(q_grad.dtype.element_ty), mask=live[:, None])


@triton.jit
def _sweep_keys(
    acc,
    q_tile,
    grad_tile,
    lse_i,
    delta_i,
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
    """dq / scale after `count` blocks of keys from `begin` on; after `before` of them `jump` positions are left out."""
    n = tl.arange(0, BLOCK_N)
    for step in range(count):
        at = begin + step * BLOCK_N
        inner = n
        if MASKED:
            at += tl.where(step >= before, jump, 0)
            inner = tl.minimum(n, S - 1 - at)
        j = at + n
        k_tile = tl.load(k_row + at.to(tl.int64) * k_s + inner[:, None] * k_s)
        v_tile = tl.load(v_row + at.to(tl.int64) * v_s + inner[:, None] * v_s)
        s = tl.dot(q_tile, tl.trans(k_tile))
        dp = tl.dot(grad_tile, tl.trans(v_tile))
        if ALIBI:
            s += (slope / scale)[:, None] * (j - start).to(tl.float32)[None, :]
        p = tl.exp2(s * (scale * LOG2E) - lse_i[:, None])
        if MASKED:
            p = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= low_i[:, None]), p, 0.0)
        ds = p * (dp - delta_i[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc)
    return acc


@triton.jit
def _key_kernel(
    grad, q, k, v, high, lse, delta, k_grad, v_grad, q_s, q_b, q_h, k_s, k_b, k_g, v_s, v_b, v_g,
    S, B, scale, H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ALIBI: tl.constexpr, SPLIT: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0), tl.cdiv(S, BLOCK_N)
    group, start = (program % G).to(tl.int64), program // G % blocks * BLOCK_N
    b = (program // (G * blocks)).to(tl.int64)
    j, c = start + tl.arange(0, BLOCK_N), tl.arange(0, C)
    held = tl.minimum(j, S - 1)
    rows = held.to(tl.int64)[:, None]
    k_tile = tl.load(k + b * k_b + group * k_g + rows * k_s + c[None, :])
    v_tile = tl.load(v + b * v_b + group * v_g + rows * v_s + c[None, :])
    high_j = tl.where(j < S, tl.load(high + b * S + held), -1)
    q_row, grad_row = q + b * q_b + c[None, :], grad + b * (H * C) + c[None, :]
    lse_row, delta_row = lse + b * H * S, delta + b * H * S
    k_acc = tl.zeros((BLOCK_N, C), tl.float32)
    v_acc = tl.zeros((BLOCK_N, C), tl.float32)
    begin = start // BLOCK_M * BLOCK_M
    end = tl.load(high + b * S + tl.minimum(start + BLOCK_N, S) - 1) + 1
    if SPLIT:
        # Whole: the blocks of queries at or after the last key of which all see the first key.
        whole = tl.cdiv(start + BLOCK_N - 1, BLOCK_M) * BLOCK_M
        whole_end = (tl.load(high + b * S + start) + 1) // BLOCK_M * BLOCK_M
        before, jump = (whole - begin) // BLOCK_M, tl.maximum(whole_end - whole, 0)
        k_acc, v_acc = _sweep_queries(
            *(k_acc, v_acc, k_tile, v_tile, q_row, grad_row, lse_row, delta_row, q_s, q_h),
            *(B, j, high_j, start, group, whole, jump // BLOCK_M, 0, 0, S, scale),
            *(H, G, C, ALIBI, False, TURNED, BLOCK_M),
        )
    else:
        before, jump = 0, 0
    k_acc, v_acc = _sweep_queries(
        *(k_acc, v_acc, k_tile, v_tile, q_row, grad_row, lse_row, delta_row, q_s, q_h),
        *(B, j, high_j, start, group, begin, tl.cdiv(end - begin - jump, BLOCK_M), before, jump),
        *(S, scale, H, G, C, ALIBI, True, TURNED, BLOCK_M),
    )
    place = ((j.to(tl.int64)[:, None] * B + b) * G + group) * C + c[None, :]
    tl.store(k_grad + place, (k_acc * scale).to(k_grad.dtype.element_ty), mask=(j < S)[:, None])
    tl.store(v_grad + place, v_acc.to(v_grad.dtype.element_ty), mask=(j < S)[:, None])


@triton.jit
def _sweep_queries(
    k_acc, v_acc, k_tile, v_tile, q_row, grad_row, lse_row, delta_row, q_s, q_h, B, j, high_j,
    start, group, begin, count, before, jump, S, scale, H: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv after `count` blocks of queries from `begin` on of each head of the group, keys by queries.

    After `before` blocks `jump` positions are left out.
    """
    m = tl.arange(0, BLOCK_M)
    for step in range(count * (H // G)):
        # Not divided by a count of 0: the pipeline may compute addresses of a step that is not taken.
        turn = step // tl.maximum(count, 1)
        block = step - turn * count
        at = begin + block * BLOCK_M
        inner = m
        if MASKED:
            at += tl.where(block >= before, jump, 0)
            inner = tl.minimum(m, S - 1 - at)
        head, i = group * (H // G) + turn, at + m
        q_tile = tl.load(q_row + head * q_h + at.to(tl.int64) * q_s + inner[:, None] * q_s)
        first = (at.to(tl.int64) * B * H + head) * C
        grad_tile = tl.load(grad_row + first + inner[:, None] * (B * H * C))
        lse_i = tl.load(lse_row + head * S + at + inner)
        delta_i = tl.load(delta_row + head * S + at + inner)
        if ALIBI:
            slope = alibi_slope(head, H, ALIBI)
            bias_j = slope / scale * (j - start).to(tl.float32)
            lse_i += slope * LOG2E * (i - start).to(tl.float32)
        if TURNED:
            s, dp = tl.dot(k_tile, tl.trans(q_tile)), tl.dot(v_tile, tl.trans(grad_tile))
            lse_i, delta_i, i_at, j_at = lse_i[None, :], delta_i[None, :], i[None, :], j[:, None]
            high_at = high_j[:, None]
            if ALIBI:
                s += bias_j[:, None]
        else:
            s, dp = tl.dot(q_tile, tl.trans(k_tile)), tl.dot(grad_tile, tl.trans(v_tile))
            lse_i, delta_i, i_at, j_at = lse_i[:, None], delta_i[:, None], i[:, None], j[None, :]
            high_at = high_j[None, :]
            if ALIBI:
                s += bias_j[None, :]
        p = tl.exp2(s * (scale * LOG2E) - lse_i)
        if MASKED:
            p = tl.where((j_at <= i_at) & (i_at <= high_at), p, 0.0)
        ds = (p * (dp - delta_i)).to(q_tile.dtype)
        p = p.to(grad_tile.dtype)
        if not TURNED:
            p, ds = tl.trans(p), tl.trans(ds)
        v_acc = tl.dot(p, grad_tile, v_acc)
        k_acc = tl.dot(ds, q_tile, k_acc)
    return k_acc, v_acc
