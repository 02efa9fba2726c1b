"""The gradient of a norm, from gradients that its readers have not added up, and three sums over tokens, in one kernel.

x = h rsqrt(mean(h^2) + eps) w. The gradient of x is the sum of up to three tensors and of a token's K rows (what the
routed experts leave, experts_backward.py); h has another reader, whose gradient is added. Each is read once, all sums
are fp32 and rounded once. Behind the experts, at T = 32768, K = 4, D = 1024, that is 0.60 GB; a sum over slots, a
norm's gradient and sums over tokens by themselves move 0.87.

A program takes tokens one by one and keeps its sums over them in registers; torch adds up the programs in a fixed
order. No atomics: two runs give the same bits.

Shapes: T tokens, K slots of each, N = T K rows sorted by expert, D hidden size, P programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class NormConfig(NamedTuple):
    """Tokens and warps of a program."""

    tokens: int
    warps: int


NORM = NormConfig(tokens=64, warps=4)
# rows_ND, and place_TK, where each slot of each token is in them.
Slotted = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Unsummed:
    """Where the routed experts leave the gradient of their input, by slots, in place of one by autograd."""

    slotted: Slotted | None = None

    def leave(
        self,
        rows_ND: torch.Tensor,
        place_TK: torch.Tensor,
        _gates_grad_TK: torch.Tensor,
        _held_1: torch.Tensor | None,
    ) -> None:
        """The gradients of x by slots and of gates, before those of weights; place, held: see dispatch.Slots."""
        self.slotted = (rows_ND, place_TK)

    def take(self) -> tuple[Slotted, list[torch.Tensor]]:
        """What was left, by slots and whole [T, D]; once."""
        taken, self.slotted = self.slotted, None
        assert taken is not None, "the experts left no gradient in this pass"
        return taken, []


def norm_gradients(
    h_TD: torch.Tensor,
    weight_D: torch.Tensor,
    grads_TD: Sequence[torch.Tensor],
    other_TD: torch.Tensor,
    eps: float,
    slotted: Slotted | None = None,
    *,
    normed: bool = False,
    config: NormConfig = NORM,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(gradient of h; x, with `normed`; sums over tokens, fp32 [3, D]: gradients of the weight and of h, and other).

    grads: one to three. All contiguous and of h's dtype, bf16 or fp32, as are the results; place int32. T > 0.
    """
    (T, D), grads = h_TD.shape, list(grads_TD)
    rows_ND, place_TK = slotted or (h_TD, None)
    K = 0 if place_TK is None else place_TK.shape[1]
    programs = triton.cdiv(T, config.tokens)
    out_TD, x_TD = torch.empty_like(h_TD), torch.empty_like(h_TD) if normed else None
    sums_P3D = h_TD.new_empty(programs, 3, D, dtype=torch.float32)
    _norm_kernel[(programs,)](
        *(h_TD, weight_D, *(grads + grads[:1] * 2)[:3], rows_ND, place_TK, other_TD),
        *(out_TD, x_TD, sums_P3D, T, float(eps)),
        *(len(grads), normed, D, triton.next_power_of_2(D), K, config.tokens),
        num_warps=config.warps,
    )
    return out_TD, x_TD, sums_P3D.sum(dim=0)


@triton.jit(do_not_specialize=["T"])
def _norm_kernel(
    h,
    weight,
    grad,
    second,
    third,
    rows,
    place,
    other,
    out,
    x,
    sums,
    T,
    eps,
    GRADS: tl.constexpr,
    NORMED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
):
    d = tl.arange(0, WIDTH)
    inside = d < D
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((WIDTH,), tl.float32)
    out_sum = tl.zeros((WIDTH,), tl.float32)
    other_sum = tl.zeros((WIDTH,), tl.float32)
    begin = tl.program_id(0) * TOKENS
    count = tl.minimum(TOKENS, T - begin)
    readers = (grad, second, third)
    ahead = _load_token(readers, rows, place, h, other, begin, GRADS, D, WIDTH, K)
    for step in range(0, count):
        # Of the next token, before this one's sums hold up all warps.
        held, following = ahead, begin + tl.minimum(step + 1, count - 1)
        ahead = _load_token(readers, rows, place, h, other, following, GRADS, D, WIDTH, K)
        cell = (begin + step).to(tl.int64) * D + d
        value, by_other = held[0].to(tl.float32), held[1].to(tl.float32)
        g = held[2].to(tl.float32)
        for i in tl.static_range(3, 2 + GRADS + K):
            g += held[i].to(tl.float32)
        turned = g * w
        # Both sums at once: the mean of turned * normal is scale times that of turned * value.
        square, along = tl.sum(value * value) / D, tl.sum(turned * value) / D
        scale = 1.0 / tl.sqrt(square + eps)
        normal = value * scale
        total = (turned - normal * (along * scale)) * scale + by_other
        tl.store(out + cell, total.to(out.dtype.element_ty), mask=inside)
        if NORMED:
            tl.store(x + cell, (normal * w).to(x.dtype.element_ty), mask=inside)
        weight_sum += g * normal
        out_sum += total
        other_sum += by_other
    to = sums + tl.program_id(0).to(tl.int64) * 3 * D + d
    tl.store(to, weight_sum, mask=inside)
    tl.store(to + D, out_sum, mask=inside)
    tl.store(to + 2 * D, other_sum, mask=inside)


@triton.jit
def _load_token(
    readers,
    rows,
    place,
    h,
    other,
    t,
    GRADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
):
    # h, other, and the gradients of x [WIDTH], as they are stored.
    d = tl.arange(0, WIDTH)
    cell, inside = t.to(tl.int64) * D + d, d < D
    held = (
        tl.load(h + cell, mask=inside, other=0.0),
        tl.load(other + cell, mask=inside, other=0.0),
    )
    for i in tl.static_range(GRADS):
        held = held + (tl.load(readers[i] + cell, mask=inside, other=0.0),)  # noqa: RUF005
    for k in tl.static_range(K):
        row = tl.load(place + t * K + k).to(tl.int64)
        held = held + (tl.load(rows + row * D + d, mask=inside, other=0.0),)  # noqa: RUF005
    return held
