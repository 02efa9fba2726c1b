"""The mixture-of-experts layer: the routed tokens are moved by indices, and the host waits for nothing at EP=1.

Each token has K slots, one for each of its experts. Slots are sorted by expert (stable, so in order of tokens), the
rows gathered, the experts run on them, and the outputs gathered back and summed over K. Both gathers are gathers in
the backward pass too: no atomics, sums over K in a fixed order and in fp32, bit by bit the same in every run.

With expert parallelism the sorted rows travel to the ranks of their experts and back (all_to_all_single on NCCL and
gloo alike); the sizes of the parts are the one thing that the host must wait for. A rank sorts what it received as if
each row were a token with one slot. EP groups may span tensor-parallel ranks, which hold slices of the rows.

Why not Megatron-Core 0.16.1's MoELayer: its dispatchers go through [tokens, experts] maps, synchronise with the host
(transformer/moe/token_dispatcher.py), and the alltoall one hands tensors to gloo where it wants integers, so that CPU
tests could not run the path that GPUs run.

Shapes: S, B, D hidden states, T = S * B tokens, K slots a token, N rows, E experts, of which L on this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from trainer.megatron.experts import Compute, RoutedExperts, SharedExpert
from trainer.megatron.router import StudentRouter


class StudentMoE(MegatronModule):
    """Routed experts and the shared one; takes the `mlp` slot of a TransformerLayer.

    submodules: linear layers of the shared expert. compute: how the routed experts are computed.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, *, compute: Compute
    ) -> None:
        super().__init__(config)
        groups = get_default_pg_collection()
        self.ep_group = groups.ep
        num_local = config.num_moe_experts // groups.ep.size()
        self.router = StudentRouter(config=config, pg_collection=groups)
        self.experts = RoutedExperts(num_local, config, compute=compute, pg_collection=groups)
        self.shared_experts = SharedExpert(config, submodules, pg_collection=groups)

    def set_layer_number(self, layer_number: int) -> None:
        """TransformerLayer tells it."""
        self.router.set_layer_number(layer_number)

    def forward(
        self, hidden_SBD: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """[S, B, D] to [S, B, D] and no bias. padding_mask [B, S], true at padding: such tokens are computed like all
        others and count in no statistic.
        """
        shared_SBD = self.shared_experts(hidden_SBD)
        padding_SB = None if padding_mask is None else padding_mask.t()
        gates_TK, experts_TK = self.router(hidden_SBD, padding_SB)
        routed_TD = self._routed(hidden_SBD.flatten(0, 1), gates_TK, experts_TK)
        return routed_TD.view_as(hidden_SBD) + shared_SBD, None

    def _routed(
        self, x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor
    ) -> torch.Tensor:
        slots = sort_slots(experts_TK, self.config.num_moe_experts)
        x_ND, gate_N = gather_rows(x_TD, slots), gather_gates(gates_TK, slots)
        if self.ep_group.size() == 1:
            y_ND = self.experts(x_ND, slots.rows_E, gate_N)
        else:
            y_ND = self._on_their_ranks(x_ND, gate_N, slots.rows_E)
        return sum_slots(y_ND, slots)

    def _on_their_ranks(
        self, x_ND: torch.Tensor, gate_N: torch.Tensor, rows_E: torch.Tensor
    ) -> torch.Tensor:
        """The gated outputs of this rank's rows (sorted by expert), computed where the experts are."""
        group = self.ep_group
        sent_RL = rows_E.view(group.size(), -1)
        received_RL = torch.empty_like(sent_RL)
        dist.all_to_all_single(received_RL, sent_RL, group=group)
        sent, received = torch.stack([sent_RL.sum(dim=1), received_RL.sum(dim=1)]).tolist()
        x_MD = all_to_all(group, x_ND, received, sent)
        gate_M = all_to_all(group, gate_N, received, sent)
        local_L = torch.arange(sent_RL.shape[1], device=x_ND.device)
        expert_M = local_L.repeat(group.size()).repeat_interleave(
            received_RL.flatten(), output_size=sum(received)
        )
        slots = sort_slots(expert_M.unsqueeze(1), len(local_L))
        gate_M = gather_gates(gate_M.unsqueeze(1), slots)
        y_MD = self.experts(gather_rows(x_MD, slots), slots.rows_E, gate_M)
        return all_to_all(group, sum_slots(y_MD, slots), sent, received)


class Slots(NamedTuple):
    """Where each slot of each token goes. order_N: the slots t * K + k by expert, N = T K; place_TK: the position of
    each slot in it, its inverse; rows_E int32: slots of each expert. All on the device.
    """

    order_N: torch.Tensor
    place_TK: torch.Tensor
    rows_E: torch.Tensor


def sort_slots(experts_TK: torch.Tensor, num_experts: int) -> Slots:
    """Slots sorted by expert, those of one expert in order of tokens. experts_TK: integers below num_experts."""
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
