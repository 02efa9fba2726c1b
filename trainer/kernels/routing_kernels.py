"""The kernels of routing.py: a program takes tokens of one row, BLOCK of them at a time, and all E experts.

Scores are compared as whole numbers of the same order: Hopper reduces those over a warp in one instruction, and every
maximum, also of NaN, is found again by equality, so that chosen ids always exist. A program is one warp: all lanes of a
token in it, no barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl

_REMOVED = tl.constexpr(-(2**31))  # below the key of -inf


@triton.jit
def choose_kernel(
    z,
    bias,
    counted,
    expert_bias,
    gates,
    experts,
    sums,
    row_tokens,
    rows,
    scaling,
    HAS_BIAS: tl.constexpr,
    HAS_COUNTED: tl.constexpr,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    G: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Gates, experts and the program's sums [3, rows, programs, E]: choices, best k of s, shares."""
    e, k = tl.arange(0, E), tl.arange(0, SLOTS)
    balance = tl.load(expert_bias + e).to(tl.float32)[None, :]
    chosen_sum = tl.zeros((E,), tl.int32)
    best_sum = tl.zeros((E,), tl.int32)
    share_sum = tl.zeros((E,), tl.float32)
    for number in range(STEPS):
        t, inside = _tokens(number, rows, row_tokens, BLOCK, STEPS)
        s = _scores(z, bias, t, inside, HAS_BIAS, E)
        biased = s + balance
        if G > 1:
            biased = _keep_groups(biased, E, TOPK, G, KEPT, BLOCK)
        ids, chosen = _best(biased, E, TOPK, SLOTS, BLOCK)
        cells = t.to(tl.int64)[:, None] * TOPK + k[None, :]
        used = inside[:, None] & (k < TOPK)[None, :]
        gate = _chosen_scores(z, bias, t, ids, used, HAS_BIAS, E)
        if TOPK > 1:
            gate = gate / (tl.sum(gate, axis=1) + 1e-20)[:, None]
        tl.store(gates + cells, gate * scaling, mask=used)
        tl.store(experts + cells, ids, mask=used)
        counts = _counts(counted, t, inside, HAS_COUNTED)[:, None]
        _, best = _best(s, E, TOPK, SLOTS, BLOCK)
        share = s * (1.0 / (tl.sum(s, axis=1) + 1e-20))[:, None]
        chosen_sum += tl.sum((counts & chosen).to(tl.int32), axis=0)
        best_sum += tl.sum((counts & best).to(tl.int32), axis=0)
        share_sum += tl.sum(tl.where(counts, share, 0.0), axis=0)
    place = sums + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * E + e
    size = tl.num_programs(0).to(tl.int64) * rows * E
    tl.store(place, chosen_sum.to(tl.float32))
    tl.store(place + size, best_sum.to(tl.float32))
    tl.store(place + 2 * size, share_sum)


@triton.jit
def _tokens(number, rows, row_tokens, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    step = (tl.program_id(0) * STEPS + number) * BLOCK + tl.arange(0, BLOCK)
    return step * rows + tl.program_id(1), step < row_tokens


@triton.jit
def _scores(z, bias, t, inside, HAS_BIAS: tl.constexpr, E: tl.constexpr):
    """sigmoid(z + bias) [BLOCK, E] fp32."""
    e = tl.arange(0, E)
    cells = t.to(tl.int64)[:, None] * E + e[None, :]
    logits = tl.load(z + cells, mask=inside[:, None], other=0.0)
    if HAS_BIAS:
        logits += tl.load(bias + e).to(tl.float32)[None, :]
    return 1.0 / (1.0 + tl.exp(-logits))


@triton.jit
def _counts(counted, t, inside, HAS_COUNTED: tl.constexpr):
    counts = inside
    if HAS_COUNTED:
        counts = counts & (tl.load(counted + t, mask=inside, other=0) != 0)
    return counts


@triton.jit
def _keep_groups(
    biased,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    G: tl.constexpr,
    KEPT: tl.constexpr,
    B: tl.constexpr,
):
    """The biased scores, -inf outside the best groups."""
    M: tl.constexpr = E // G
    by_group = tl.reshape(biased, (B, G, M))
    left = by_group
    m, g = tl.arange(0, M), tl.arange(0, G)
    score = tl.max(left, axis=2)
    for _ in tl.static_range(1, TOPK // KEPT):
        top = tl.argmax(left, axis=2, tie_break_left=True)
        left = tl.where(m[None, None, :] == top[:, :, None], -float("inf"), left)
        score += tl.max(left, axis=2)
    kept = tl.zeros((B, G), tl.int32)
    for _ in tl.static_range(KEPT):
        top = tl.argmax(score, axis=1, tie_break_left=True)
        hit = g[None, :] == top[:, None]
        kept = tl.where(hit, 1, kept)
        score = tl.where(hit, -float("inf"), score)
    allowed = tl.broadcast_to(kept[:, :, None], (B, G, M)) > 0
    return tl.reshape(tl.where(allowed, by_group, -float("inf")), (B, E))


@triton.jit
def _best(score, E: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, B: tl.constexpr):
    """Ids [B, SLOTS] of the best TOPK scores of each token, best first, ties to the lower id; true [B, E] there."""
    e, k = tl.arange(0, E), tl.arange(0, SLOTS)
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = tl.zeros((B, SLOTS), tl.int32)
    for i in tl.static_range(TOPK):
        top = tl.max(key, axis=1)
        place = tl.min(tl.where(key == top[:, None], e[None, :], E), axis=1)
        key = tl.where(e[None, :] == place[:, None], _REMOVED, key)
        ids = tl.where(k[None, :] == i, place[:, None], ids)
    return ids, key == _REMOVED


@triton.jit
def _chosen_scores(z, bias, t, ids, used, HAS_BIAS: tl.constexpr, E: tl.constexpr):
    """s of the chosen experts, 0 where not used; the same bits as in `_scores`."""
    logits = tl.load(z + t.to(tl.int64)[:, None] * E + ids, mask=used, other=0.0)
    if HAS_BIAS:
        logits += tl.load(bias + ids).to(tl.float32)
    return tl.where(used, 1.0 / (1.0 + tl.exp(-logits)), 0.0)


@triton.jit
def gradient_kernel(
    z,
    bias,
    counted,
    experts,
    gates_grad,
    shares_grad,
    grad,
    sums,
    row_tokens,
    rows,
    scaling,
    HAS_BIAS: tl.constexpr,
    HAS_COUNTED: tl.constexpr,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Gradient of the logits, and the program's sums of it over tokens [rows, programs, E]."""
    row, e, k = tl.program_id(1), tl.arange(0, E), tl.arange(0, SLOTS)
    share_grad = tl.load(shares_grad + row * E + e)[None, :]
    total = tl.zeros((E,), tl.float32)
    for number in range(STEPS):
        t, inside = _tokens(number, rows, row_tokens, BLOCK, STEPS)
        s = _scores(z, bias, t, inside, HAS_BIAS, E)
        # Shares: w s_e with w = 1 / sum_j s_j, so ds_e = w (dS_e - w sum_j dS_j s_j).
        per = 1.0 / (tl.sum(s, axis=1) + 1e-20)
        drop = tl.sum(share_grad * s, axis=1) * per
        counts = _counts(counted, t, inside, HAS_COUNTED)[:, None]
        score_grad = tl.where(counts, per[:, None] * (share_grad - drop[:, None]), 0.0)
        cells = t.to(tl.int64)[:, None] * TOPK + k[None, :]
        used = inside[:, None] & (k < TOPK)[None, :]
        ids = tl.load(experts + cells, mask=used, other=0)
        slot_grad = tl.load(gates_grad + cells, mask=used, other=0.0) * scaling
        if TOPK > 1:
            value = _chosen_scores(z, bias, t, ids, used, HAS_BIAS, E)
            whole = (tl.sum(value, axis=1) + 1e-20)[:, None]
            slot_grad = (slot_grad - tl.sum(slot_grad * value / whole, axis=1)[:, None]) / whole
        for i in tl.static_range(TOPK):
            this = k[None, :] == i
            own = tl.sum(tl.where(this, slot_grad, 0.0), axis=1)
            top = tl.sum(tl.where(this, ids, 0), axis=1)
            score_grad += tl.where(e[None, :] == top[:, None], own[:, None], 0.0)
        out = tl.where(inside[:, None], score_grad * s * (1.0 - s), 0.0)
        _store_gradient(grad, out, t, inside, PARTS, E)
        total += tl.sum(out, axis=0)
    place = (row * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * E
    tl.store(sums + place + e, total)


@triton.jit
def _store_gradient(grad, out, t, inside, PARTS: tl.constexpr, E: tl.constexpr):
    e, wide, mask = tl.arange(0, E), t.to(tl.int64)[:, None], inside[:, None]
    if PARTS:
        high = out.to(tl.bfloat16)
        low = (out - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(grad + wide * (2 * E) + e[None, :], high, mask=mask)
        tl.store(grad + wide * (2 * E) + E + e[None, :], low, mask=mask)
    else:
        tl.store(grad + wide * E + e[None, :], out, mask=mask)
