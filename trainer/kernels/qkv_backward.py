"""Gradients of queries, keys and values (qkv.py): one kernel over tokens, and one that adds up what programs leave.

A program is one warp with a few tokens, of one position or of several. What belongs to other tokens too it leaves as
fp32 sums of its own: the gradient of a rotation, one slice for each part of a position's rows, and that of bias, norms
and logit, one row of `parts_LZ` a program; `_fold_kernel` adds these in a fixed order, in two rounds. Larger programs
would leave less (0.1 GB at 32,768 tokens of the full width), but the sum of a head's bias then waits for all warps,
12 times: 8 warps on 16 tokens took 390 us where one on 2 takes 213 (H200, 32,768 tokens).

Shapes: as in qkv.py; L programs, Z columns of a program's sums: [bias Y (TPA only) | q_norm C | k_norm C | logit].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trainer.kernels.qkv_heads import (
    Program,
    QKVShape,
    before_norm,
    head_slot,
    load_factors,
    load_halves,
    load_head,
)

BACKWARD = Program(tokens=2, warps=1, registers=168)
_FOLD = (64, 64)  # rows at a time and columns of a program that adds up parts
_CHUNK = 256  # parts a program of the first round adds up

Gradients = tuple[torch.Tensor | None, ...]


def gradients(
    query_grad_THC: torch.Tensor,
    key_grad_TGC: torch.Tensor,
    value_grad_TGC: torch.Tensor,
    mixed_TX: torch.Tensor,
    bias_Y: torch.Tensor | None,
    q_norm_C: torch.Tensor,
    k_norm_C: torch.Tensor,
    rotation_2SP: torch.Tensor | None,
    first_value_TGC: torch.Tensor | None,
    logit: torch.Tensor | None,
    *,
    shape: QKVShape,
    config: Program = BACKWARD,
) -> Gradients:
    """Gradients of the seven inputs of `qkv`, in their dtypes; None of those that are None.

    The three gradients bf16, any strides with channels next to each other (else they are copied); others contiguous.
    """
    grads = [
        g if g.stride(-1) == 1 else g.contiguous()
        for g in (query_grad_THC, key_grad_TGC, value_grad_TGC)
    ]
    inputs = (mixed_TX, bias_Y, q_norm_C, k_norm_C, rotation_2SP, first_value_TGC, logit)
    outs = [None if t is None else torch.empty_like(t) for t in inputs]
    rows = shape.rows if rotation_2SP is not None else 1
    held = min(triton.next_power_of_2(rows), config.tokens)
    splits, positions = triton.cdiv(rows, held), len(mixed_TX) // rows
    programs = triton.cdiv(positions, config.tokens // held) * splits
    if rotation_2SP is not None and splits > 1:
        outs[4] = rotation_2SP.new_empty(splits, *rotation_2SP.shape)
    Y, P = shape.bias_width if shape.q_rank else 0, shape.head_dim // 2
    Z = Y + 4 * P + 32  # the logit's column fills a line of 128 bytes
    parts_LZ = mixed_TX.new_empty(programs, Z, dtype=torch.float32)
    flags = (rotation_2SP is not None, logit is not None)
    _backward_kernel[(programs,)](
        *inputs,
        *grads,
        *(s for g in grads for s in g.stride()[:2]),
        *(outs[0], outs[4], outs[5], parts_LZ, positions, shape.eps),
        *(rows, held, splits, shape.mixed_width, Y, Z, shape.heads, shape.groups, P),
        *(shape.q_rank, shape.kv_rank, *shape.offsets(), *flags, config.tokens),
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    _fold(parts_LZ, (outs[1], outs[2], outs[3], outs[6]), (Y, 2 * P, Z, flags[1]))
    if rotation_2SP is not None and splits > 1:
        outs[4] = outs[4].sum(dim=0)
    return tuple(outs)


def _fold(
    parts_LZ: torch.Tensor, outs: tuple[torch.Tensor | None, ...], sizes: tuple[int, ...]
) -> None:
    """The sums of parts into the gradients of bias, norms and logit."""
    (L, Z), (rows, cols) = parts_LZ.shape, _FOLD
    chunks = triton.cdiv(L, _CHUNK)
    some = parts_LZ.new_empty(chunks, Z)
    grid = (triton.cdiv(Z, cols), chunks)
    _fold_kernel[grid](parts_LZ, some, *outs, L, *sizes, _CHUNK, rows, cols, False, num_warps=4)
    last = (grid[0], 1)
    _fold_kernel[last](some, some, *outs, chunks, *sizes, L, rows, cols, True, num_warps=4)


@triton.jit
def _backward_kernel(
    mixed, bias, q_norm, k_norm, rotation, first_value, logit, query_grad, key_grad, value_grad,
    query_t, query_h, key_t, key_h, value_t, value_h, mixed_grad, rotation_grad, first_grad,
    parts, S, eps, ROWS: tl.constexpr, HELD: tl.constexpr, SPLITS: tl.constexpr, X: tl.constexpr,
    Y: tl.constexpr, Z: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    RQ: tl.constexpr, R: tl.constexpr, AQ: tl.constexpr, AK: tl.constexpr, AV: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, ROTATED: tl.constexpr, MIXES: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    # A program holds HELD of the ROWS of M / HELD positions, SPLITS of them all rows. Gradients of what is no token are
    # zeros, so it adds nothing anywhere; its inputs are those of token 0.
    m, p = tl.arange(0, M)[:, None], tl.arange(0, P)[None, :]
    place, split = tl.program_id(0) // SPLITS * (M // HELD), tl.program_id(0) % SPLITS
    s, row = place + m // HELD, split * HELD + m % HELD
    valid = (s < S) & (row < ROWS)
    token = tl.where(valid, s.to(tl.int64) * ROWS + row, 0)
    x, out, part = mixed + token * X, mixed_grad + token * X, parts + tl.program_id(0) * Z
    cos, sin = 0.0, 0.0
    if ROTATED:
        turn = rotation + token // ROWS * P + p
        cos, sin = tl.load(turn), tl.load(turn + S * P)
    cos_grad, sin_grad = tl.zeros((M, P), tl.float32), tl.zeros((M, P), tl.float32)
    cos_grad, sin_grad = _normed(
        *(x, bias, q_norm, query_grad + token * query_t, query_h, out, part, part + Y),
        *(valid, cos, sin, cos_grad, sin_grad, eps),
        *(H, H // G, 0, H // G + 2, AQ, BQ, RQ, P, ROTATED, M),
    )
    cos_grad, sin_grad = _normed(
        *(x, bias, k_norm, key_grad + token * key_t, key_h, out, part, part + Y + 2 * P),
        *(valid, cos, sin, cos_grad, sin_grad, eps),
        *(G, 1, H // G, H // G + 2, AK, BK, R, P, ROTATED, M),
    )
    if ROTATED:
        place += tl.arange(0, M // HELD)[:, None]
        to = rotation_grad + (split * 2 * S + place).to(tl.int64) * P + p
        of_cos = tl.sum(tl.reshape(cos_grad, (M // HELD, HELD, P)), axis=1)
        of_sin = tl.sum(tl.reshape(sin_grad, (M // HELD, HELD, P)), axis=1)
        tl.store(to, of_cos, mask=place < S)
        tl.store(to + S * P, of_sin, mask=place < S)
    _values(
        *(x, bias, first_value, logit, value_grad + token * value_t, value_h, out, first_grad),
        *(part, part + Y + 4 * P, token, valid),
        *(G, H // G, AV, BV, R, P, MIXES, M),
    )


@triton.jit
def _normed(
    x, bias, weight, grad, grad_h, out, part, weight_part, valid, cos, sin, cos_grad, sin_grad,
    eps, HEADS: tl.constexpr, PER: tl.constexpr, FIRST: tl.constexpr, SLOTS: tl.constexpr,
    A_AT: tl.constexpr, B_AT: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    ROTATED: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    # Queries or keys, as qkv._normed. Returns the gradients of cos and sin [M, P] with these heads added.
    p = tl.arange(0, P)[None, :]
    lefts, rights = load_factors(x, B_AT, R, P)
    left_grads, right_grads = _zeros(R, M, P), _zeros(R, M, P)
    w_left, w_right = load_halves(tl.broadcast_to(weight, x.shape) + p, P)
    dw_left, dw_right = tl.zeros((M, P), tl.float32), tl.zeros((M, P), tl.float32)
    grad += p
    ahead = load_head(x, bias, A_AT, FIRST, R, P)
    ahead_left = tl.load(grad, mask=valid, other=0.0)
    ahead_right = tl.load(grad + P, mask=valid, other=0.0)
    for h in range(HEADS):
        slot, held = head_slot(h, PER, FIRST, SLOTS), ahead
        g_left, g_right = ahead_left.to(tl.float32), ahead_right.to(tl.float32)
        following = tl.minimum(h + 1, HEADS - 1)
        ahead_slot = head_slot(following, PER, FIRST, SLOTS)
        ahead = load_head(x, bias, A_AT + following * R, ahead_slot, R, P)
        ahead_left = tl.load(grad + following * grad_h, mask=valid, other=0.0)
        ahead_right = tl.load(grad + following * grad_h + P, mask=valid, other=0.0)
        left, right = before_norm(held, lefts, rights, R)
        square = tl.sum(left * left + right * right, axis=1, keep_dims=True)
        scale = tl.rsqrt(square * (0.5 / P) + eps)
        left, right = left * scale, right * scale
        if ROTATED:
            y_left, y_right = left * w_left, right * w_right
            # A product a line: each is one multiply-add.
            cos_grad += g_left * y_left
            cos_grad += g_right * y_right
            sin_grad += g_right * y_left
            sin_grad -= g_left * y_right
            turned = g_left * cos + g_right * sin
            g_right = g_right * cos - g_left * sin
            g_left = turned
        dw_left += g_left * left
        dw_right += g_right * right
        g_left, g_right = g_left * w_left, g_right * w_right
        along = tl.sum(g_left * left + g_right * right, axis=1, keep_dims=True) * (0.5 / P)
        g_left, g_right = (g_left - left * along) * scale, (g_right - right * along) * scale
        left_grads, right_grads = _projected(
            *(g_left, g_right, held, lefts, rights, left_grads, right_grads, out, part, valid),
            *(A_AT + h * R, slot, R, P),
        )
    _store_factors(left_grads, right_grads, out, valid, B_AT, R, P)
    _store_sum(weight_part, dw_left)
    _store_sum(weight_part + P, dw_right)
    return cos_grad, sin_grad


@triton.jit
def _values(
    x,
    bias,
    first_value,
    logit,
    grad,
    grad_h,
    out,
    first_grad,
    part,
    logit_part,
    token,
    valid,
    G: tl.constexpr,
    QUERIES: tl.constexpr,
    A_AT: tl.constexpr,
    B_AT: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    MIXES: tl.constexpr,
    M: tl.constexpr,
):
    p = tl.arange(0, P)[None, :]
    lefts, rights = load_factors(x, B_AT, R, P)
    left_grads, right_grads = _zeros(R, M, P), _zeros(R, M, P)
    between = tl.zeros((M, P), tl.float32)
    for g in range(G):
        slot = g * (QUERIES + 2) + QUERIES + 1
        at = grad + g * grad_h + p
        g_left = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        g_right = tl.load(at + P, mask=valid, other=0.0).to(tl.float32)
        held = load_head(x, bias, A_AT + g * R, slot, R, P)
        if MIXES:
            kind = out.dtype.element_ty
            own, other = tl.sigmoid(tl.load(logit)), tl.sigmoid(-tl.load(logit))
            left, right = before_norm(held, lefts, rights, R)
            of = token * (G * 2 * P) + g * 2 * P + p
            v_left, v_right = load_halves(first_value + of, P)
            between += g_left * (left.to(kind).to(tl.float32) - v_left)
            between += g_right * (right.to(kind).to(tl.float32) - v_right)
            tl.store(first_grad + of, (other * g_left).to(kind), mask=valid)
            tl.store(first_grad + of + P, (other * g_right).to(kind), mask=valid)
            g_left, g_right = own * g_left, own * g_right
        left_grads, right_grads = _projected(
            *(g_left, g_right, held, lefts, rights, left_grads, right_grads, out, part, valid),
            *(A_AT + g * R, slot, R, P),
        )
    _store_factors(left_grads, right_grads, out, valid, B_AT, R, P)
    if MIXES:
        slope = tl.sigmoid(tl.load(logit)) * tl.sigmoid(-tl.load(logit))
        tl.store(logit_part, slope * tl.sum(tl.sum(between, axis=1), axis=0))


@triton.jit
def _projected(
    g_left,
    g_right,
    held,
    lefts,
    rights,
    left_grads,
    right_grads,
    out,
    part,
    valid,
    a_at,
    slot,
    R: tl.constexpr,
    P: tl.constexpr,
):
    # From the gradient of a head as projected: that of the projection's columns, or of its bias and factors.
    # Returns the gradients of b [R, M, C] with this head added.
    p = tl.arange(0, P)
    lefts_out, rights_out = (), ()
    if R == 0:
        at = out + slot * 2 * P + p[None, :]
        tl.store(at, g_left.to(at.dtype.element_ty), mask=valid)
        tl.store(at + P, g_right.to(at.dtype.element_ty), mask=valid)
    else:
        _store_sum(part + slot * 2 * P, g_left)
        _store_sum(part + slot * 2 * P + P, g_right)
        for r in tl.static_range(R):
            a = held[2 + r].to(tl.float32) * (1.0 / R)
            a_grad = tl.sum(g_left * lefts[r] + g_right * rights[r], axis=1, keep_dims=True)
            at = out + a_at + r
            tl.store(at, (a_grad * (1.0 / R)).to(at.dtype.element_ty), mask=valid)
            lefts_out = lefts_out + (left_grads[r] + a * g_left,)  # noqa: RUF005
            rights_out = rights_out + (right_grads[r] + a * g_right,)  # noqa: RUF005
    return lefts_out, rights_out


@triton.jit
def _store_sum(at, x):
    # The sum over tokens, by the threads that hold the first one: nothing moves to threads of another layout.
    m, p = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    of_all = tl.broadcast_to(tl.sum(x, axis=0, keep_dims=True), x.shape)
    places, first = tl.broadcast_to(at + p, x.shape), tl.broadcast_to(m == 0, x.shape)
    tl.store(places, of_all, mask=first)


@triton.jit
def _zeros(R: tl.constexpr, M: tl.constexpr, P: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(R):
        zeros = zeros + (tl.zeros((M, P), tl.float32),)  # noqa: RUF005
    return zeros


@triton.jit
def _store_factors(lefts, rights, out, valid, B_AT: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    p = tl.arange(0, P)[None, :]
    for r in tl.static_range(R):
        at = out + (B_AT + r * 2 * P) + p
        tl.store(at, lefts[r].to(at.dtype.element_ty), mask=valid)
        tl.store(at + P, rights[r].to(at.dtype.element_ty), mask=valid)


@triton.jit
def _fold_kernel(
    parts, some, bias_grad, q_grad, k_grad, logit_grad, programs, Y: tl.constexpr,
    C: tl.constexpr, Z: tl.constexpr, MIXES: tl.constexpr, CHUNK, BLOCK: tl.constexpr,
    COLS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    # Sums of CHUNK parts: a row of `some` each, or, of all that are left, the gradients.
    z = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1) * CHUNK
    row, end = first + tl.arange(0, BLOCK)[:, None], tl.minimum(first + CHUNK, programs)
    total = tl.zeros((BLOCK, COLS), tl.float32)
    for start in range(0, end - first, BLOCK):
        mask = (row + start < end) & (z < Y + 2 * C + 1)[None, :]
        total += tl.load(parts + (row + start).to(tl.int64) * Z + z[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, axis=0)
    if not LAST:
        tl.store(some + tl.program_id(1) * Z + z, sums, mask=z < Z)
    else:
        if Y > 0:
            tl.store(bias_grad + z, sums, mask=z < Y)
        tl.store(q_grad + z - Y, sums, mask=(z >= Y) & (z < Y + C))
        tl.store(k_grad + z - Y - C, sums, mask=(z >= Y + C) & (z < Y + 2 * C))
        if MIXES:
            tl.store(logit_grad + z - Y - 2 * C, sums, mask=z == Y + 2 * C)
