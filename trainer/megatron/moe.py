"""The mixture-of-experts layer: the routed tokens are moved by indices, and the host waits for nothing at EP=1.

Each token has K slots, one for each of its experts. Slots are sorted by expert (stable, so in order of tokens), the
experts run on the rows of their slots, and the outputs are summed over K. On a CPU rows are gathered and summed by
dispatch.py; on CUDA the experts' kernels read and write rows where they lie (trainer/kernels).

With expert parallelism the sorted rows travel to the ranks of their experts and back (all_to_all_single on NCCL and
gloo alike); the sizes of the parts are the one thing that the host must wait for. A rank sorts what it received as if
each row were a token with one slot. EP groups may span tensor-parallel ranks, which hold slices of the rows.

Why not Megatron-Core 0.16.1's MoELayer: its dispatchers go through [tokens, experts] maps, synchronise with the host
(transformer/moe/token_dispatcher.py), and the alltoall one hands tensors to gloo where it wants integers, so that CPU
tests could not run the path that GPUs run.

Shapes: S, B, D hidden states, T = S * B tokens, K slots a token, N rows, E experts, of which L on this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from trainer.megatron.dispatch import gather_gates, gather_rows, sum_slots
from trainer.megatron.experts import Compute, RoutedExperts, SharedExpert
from trainer.megatron.router import StudentRouter

if TYPE_CHECKING:  # triton is on CUDA alone
    from trainer.kernels.norm import Unsummed


class StudentMoE(MegatronModule):
    """Routed experts and the shared one; takes the `mlp` slot of a TransformerLayer.

    submodules: linear layers of the shared expert. compute: how routing and routed experts are computed.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, *, compute: Compute
    ) -> None:
        super().__init__(config)
        groups = get_default_pg_collection()
        self.ep_group = groups.ep
        num_local = config.num_moe_experts // groups.ep.size()
        self.router = StudentRouter(config=config, pg_collection=groups, compute=compute)
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
        return self.routed(hidden_SBD, padding_mask, self.shared_experts(hidden_SBD)), None

    def routed(
        self,
        x_SBD: torch.Tensor,
        padding_mask: torch.Tensor | None,
        shared_SBD: torch.Tensor,
        *,
        residual_SBD: torch.Tensor | None = None,
        router_x_SBD: torch.Tensor | None = None,
        unsummed: Unsummed | None = None,
    ) -> torch.Tensor:
        """shared + residual, if there is one, + what the routed experts make of x, [S, B, D].

        router_x: x for the router, where it is given once for each reader. unsummed: what takes the experts' gradients
        of x instead of autograd, see trainer/kernels/norm.py; only where this rank has all experts.
        """
        padding_SB = None if padding_mask is None else padding_mask.t()
        gates_TK, experts_TK = self.router(
            x_SBD if router_x_SBD is None else router_x_SBD, padding_SB
        )
        x_TD = x_SBD.flatten(0, 1)
        bases = [t.flatten(0, 1) for t in (shared_SBD, residual_SBD) if t is not None]
        if self.ep_group.size() == 1:
            slots = self.experts.sort(experts_TK, self.config.num_moe_experts)
            out_TD = self.experts(x_TD, gates_TK, slots, *bases, unsummed=unsummed)
        else:
            out_TD = sum(bases, start=self._on_their_ranks(x_TD, gates_TK, experts_TK))
        return out_TD.view_as(shared_SBD)

    def _on_their_ranks(
        self, x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor
    ) -> torch.Tensor:
        """What the routed experts add: this rank's rows, sorted by expert, are computed where the experts are."""
        group = self.ep_group
        slots = self.experts.sort(experts_TK, self.config.num_moe_experts)
        x_ND, gate_N = gather_rows(x_TD, slots), gather_gates(gates_TK, slots)
        sent_RL = slots.rows_E.view(group.size(), -1)
        received_RL = torch.empty_like(sent_RL)
        dist.all_to_all_single(received_RL, sent_RL, group=group)
        sent, received = torch.stack([sent_RL.sum(dim=1), received_RL.sum(dim=1)]).tolist()
        x_MD = all_to_all(group, x_ND, received, sent)
        gate_M = all_to_all(group, gate_N, received, sent)
        local_L = torch.arange(sent_RL.shape[1], dtype=experts_TK.dtype, device=x_ND.device)
        expert_M = local_L.repeat(group.size()).repeat_interleave(
            received_RL.flatten(), output_size=sum(received)
        )
        here = self.experts.sort(expert_M.unsqueeze(1), len(local_L))
        y_MD = self.experts(x_MD, gate_M.unsqueeze(1), here)
        return sum_slots(all_to_all(group, y_MD, sent, received), slots)
