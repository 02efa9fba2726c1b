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


class Slotted(NamedTuple):
    """Gradients by slots: rows_ND, and place_TK int32, where each slot of each token is in them; held_1: how many rows
    there are, None: as many as slots. A slot beyond them adds nothing.
    """

    rows_ND: torch.Tensor
    place_TK: torch.Tensor
    held_1: torch.Tensor | None = None


@dataclass
class Unsummed:
    """Where the routed experts leave the gradient of their input x, by slots, in place of one by autograd; and where x
    and the gradient of the layer's input are written.
    """

    slotted: Slotted | None = None

    def room_for_x(self, like_TD: torch.Tensor) -> torch.Tensor:
        """Where x is to be written."""
        return torch.empty_like(like_TD)

    def room_for_gradient(self, like_TD: torch.Tensor) -> torch.Tensor:
        """Where the gradient of the layer's input is to be written."""
        return torch.empty_like(like_TD)

    def leave(
        self,
        rows_ND: torch.Tensor,
        place_TK: torch.Tensor,
        _gates_grad_TK: torch.Tensor,
        held_1: torch.Tensor | None,
    ) -> None:
        """The gradients of x by slots and of gates, before those of weights; place, held: see dispatch.Slots."""
        self.slotted = Slotted(rows_ND, place_TK, held_1)

    def take(self) -> list[Slotted]:
        """What was left; once."""
        taken, self.slotted = self.slotted, None
        assert taken is not None, "the experts left no gradient in this pass"
        return [taken]


def norm_gradients(
    h_TD: torch.Tensor,
    weight_D: torch.Tensor,
    grads_TD: Sequence[torch.Tensor],
    other_TD: torch.Tensor,
    eps: float,
    slotted: Sequence[Slotted] = (),
    *,
    normed: bool = False,
    out_TD: torch.Tensor | None = None,
    config: NormConfig = NORM,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(gradient of h; x, with `normed`; sums over tokens, fp32 [3, D]: gradients of the weight and of h, and other).

    grads: one to three; slotted: at most two, the second without held. All contiguous and of h's dtype, bf16 or fp32,
    as are the results. out: takes the gradient of h. T > 0.
    """
    (T, D), grads = h_TD.shape, list(grads_TD)
    nothing = Slotted(h_TD, torch.empty(0, 0))
    first, second = [*slotted, nothing, nothing][:2]
    slots = (first.place_TK.shape[1], first.held_1 is not None, second.place_TK.shape[1])
    programs = triton.cdiv(T, config.tokens)
    out_TD = torch.empty_like(h_TD) if out_TD is None else out_TD
    x_TD = torch.empty_like(h_TD) if normed else None
    sums_P3D = h_TD.new_empty(programs, 3, D, dtype=torch.float32)
    _norm_kernel[(programs,)](
        *(h_TD, weight_D, *(grads + grads[:1] * 2)[:3], other_TD, out_TD, x_TD, sums_P3D),
        *(*_pointers(first, h_TD), *_pointers(second, h_TD)[:2], T, float(eps)),
        *(len(grads), normed, D, triton.next_power_of_2(D), *slots, config.tokens),
        num_warps=config.warps,
    )
    return out_TD, x_TD, sums_P3D.sum(dim=0)


def _pointers(slotted: Slotted, stand_in: torch.Tensor) -> list[torch.Tensor]:
    """Arguments for the kernel, which reads none that is absent."""
    rows_ND, place_TK, held_1 = slotted
    return [
        rows_ND,
        place_TK if place_TK.numel() else stand_in,
        stand_in if held_1 is None else held_1,
    ]


@triton.jit(do_not_specialize=["T"])
def _norm_kernel(
    h,
    weight,
    grad,
    second,
    third,
    other,
    out,
    x,
    sums,
    rows,
    place,
    held,
    more_rows,
    more_place,
    T,
    eps,
    GRADS: tl.constexpr,
    NORMED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    HELD: tl.constexpr,
    MORE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    d = tl.arange(0, WIDTH)
    inside = d < D
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    none = tl.zeros((WIDTH,), tl.float32)
    weight_sum, out_sum, other_sum = none, none, none
    begin = tl.program_id(0) * TOKENS
    count = tl.minimum(TOKENS, T - begin)
    num_held = tl.load(held) if HELD else 0
    readers, slotted = (grad, second, third), (rows, place, num_held, more_rows, more_place)
    ahead = _load_token(readers, slotted, h, other, begin, GRADS, D, WIDTH, K, HELD, MORE)
    for step in range(0, count):
        # Of the next token, before this one's sums hold up all warps.
        now, following = ahead, begin + tl.minimum(step + 1, count - 1)
        ahead = _load_token(readers, slotted, h, other, following, GRADS, D, WIDTH, K, HELD, MORE)
        cell, value = (begin + step).to(tl.int64) * D + d, now[0].to(tl.float32)
        by_other, g = now[1].to(tl.float32), now[2].to(tl.float32)
        for i in tl.static_range(3, 2 + GRADS + K + MORE):
            g += now[i].to(tl.float32)
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
    slotted,
    h,
    other,
    t,
    GRADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    HELD: tl.constexpr,
    MORE: tl.constexpr,
):
    # h, other, and the gradients of x [WIDTH], as they are stored.
    rows, place, num_held, more_rows, more_place = slotted
    d = tl.arange(0, WIDTH)
    cell, inside = t.to(tl.int64) * D + d, d < D
    loaded = (
        tl.load(h + cell, mask=inside, other=0.0),
        tl.load(other + cell, mask=inside, other=0.0),
    )
    for i in tl.static_range(GRADS):
        loaded = loaded + (tl.load(readers[i] + cell, mask=inside, other=0.0),)  # noqa: RUF005
    for k in tl.static_range(K):
        row = tl.load(place + t * K + k).to(tl.int64)
        there = inside & (row < num_held) if HELD else inside
        loaded = loaded + (tl.load(rows + row * D + d, mask=there, other=0.0),)  # noqa: RUF005
    for k in tl.static_range(MORE):
        row = tl.load(more_place + t * MORE + k).to(tl.int64)
        loaded = loaded + (tl.load(more_rows + row * D + d, mask=inside, other=0.0),)  # noqa: RUF005
    return loaded
