"""Moving rows to their experts and back by indices, in plain torch, for any device and dtype.

Both moves are gathers in the backward pass too: no atomics, sums over a token's slots in a fixed order and in fp32, bit
by bit the same in every run. On CUDA the experts' kernels move their rows themselves (trainer/kernels).

Shapes: T tokens, K slots a token, N = T K slots, E experts, D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Slots(NamedTuple):
    """Where each slot of each token goes. order_N: the slots t * K + k by expert, N = T K; place_TK: the position of
    each slot in it, its inverse; rows_E int32: slots of each expert. All on the device. Slots of experts elsewhere
    stand last and are in no expert's rows.
    """

    order_N: torch.Tensor
    place_TK: torch.Tensor
    rows_E: torch.Tensor


def sort_slots(experts_TK: torch.Tensor, num_experts: int, first: int | None = None) -> Slots:
    """Slots sorted by expert, those of one expert in order of tokens. experts_TK: integers below num_experts.

    first: only the experts first .. first + num_experts - 1 are here, whatever others experts_TK names.
    """
    if first is not None:
        here = (experts_TK >= first) & (experts_TK < first + num_experts)
        experts_TK = (experts_TK - first).where(here, num_experts)
    # A radix sort of 16 bits takes a quarter of the passes of one of 64.
    key_N, order_N = experts_TK.flatten().to(torch.int16).sort(stable=True)
    place_N = torch.empty_like(order_N)
    place_N.scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    every_E = torch.arange(num_experts, dtype=key_N.dtype, device=key_N.device)
    ends_E = torch.searchsorted(key_N, every_E, right=True, out_int32=True)
    rows_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    return Slots(order_N, place_N.view_as(experts_TK), rows_E)


def gather_rows(x_TD: torch.Tensor, slots: Slots) -> torch.Tensor:
    """[N, D]: the row of each slot's token, in the order of slots."""
    return _Spread.apply(x_TD, slots.order_N, slots.place_TK)


def gather_gates(gate_TK: torch.Tensor, slots: Slots) -> torch.Tensor:
    """[N]: the gate of each slot, in the order of slots."""
    return _Spread.apply(gate_TK.flatten(), slots.order_N, slots.place_TK.view(-1, 1))


def sum_slots(y_ND: torch.Tensor, slots: Slots) -> torch.Tensor:
    """[T, D]: the sum over each token's slots."""
    return _Collect.apply(y_ND, slots.order_N, slots.place_TK)


class _Spread(torch.autograd.Function):
    """out[n] = x[order[n] // K]; its transpose is `_Collect`."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, order_N: torch.Tensor, place_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(place_TK)
        return _spread(x_TD, order_N, place_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return _collect(grad_ND, place_TK), None, None


class _Collect(torch.autograd.Function):
    """out[t] = sum over k of y[place[t, k]]; its transpose is `_Spread`."""

    @staticmethod
    def forward(
        ctx: Any, y_ND: torch.Tensor, order_N: torch.Tensor, place_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order_N)
        ctx.slots = place_TK.shape[1]
        return _collect(y_ND, place_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (order_N,) = ctx.saved_tensors
        return _spread(grad_TD, order_N, ctx.slots), None, None


def _spread(x_TD: torch.Tensor, order_N: torch.Tensor, slots: int) -> torch.Tensor:
    return x_TD.index_select(0, order_N if slots == 1 else order_N // slots)


def _collect(y_ND: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    by_token = y_ND.index_select(0, place_TK.flatten())
    if place_TK.shape[1] == 1:
        return by_token
    # The sum of a reduced-precision tensor runs in fp32 and is rounded once.
    return by_token.unflatten(0, place_TK.shape).sum(dim=1)
