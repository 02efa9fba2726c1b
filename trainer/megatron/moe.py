"""The mixture-of-experts layer: the routed tokens are moved by indices, and the host waits for nothing.

Each token has K slots, one for each of its experts. Slots are sorted by expert (stable, so in order of tokens), the
experts run on the rows of their slots, and the outputs are summed over K. On a CPU rows are gathered and summed by
dispatch.py; on CUDA the experts' kernels read and write rows where they lie (trainer/kernels).

With expert parallelism every rank of the group gets all tokens and sorts those of its own experts (exchange.py). EP
groups may span tensor-parallel ranks, which hold slices of the rows.

Why not Megatron-Core 0.16.1's MoELayer: its dispatchers go through [tokens, experts] maps, synchronise with the host
(transformer/moe/token_dispatcher.py), and the alltoall one hands tensors to gloo where it wants integers, so that CPU
tests could not run the path that GPUs run.

Shapes: S, B, D hidden states, T = S * B tokens, K slots a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from trainer.megatron.exchange import Gathering, gather_choices, give_back
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
        of x instead of autograd, see trainer/kernels/norm.py. With expert parallelism all ranks of the group bring as
        many tokens.
        """
        x_TD, group = x_SBD.flatten(0, 1), self.ep_group
        if group.size() > 1:  # on its way while experts are chosen
            gathering = Gathering(x_TD, group, unsummed)
        padding_SB = None if padding_mask is None else padding_mask.t()
        gates_TK, experts_TK = self.router(
            x_SBD if router_x_SBD is None else router_x_SBD, padding_SB
        )
        bases = [t.flatten(0, 1) for t in (shared_SBD, residual_SBD) if t is not None]
        if group.size() == 1:
            slots = self.experts.sort(experts_TK)
            out_TD = self.experts(x_TD, gates_TK, slots, *bases, unsummed=unsummed)
        else:
            gates_XK, experts_XK = gather_choices(gates_TK, experts_TK, group)
            slots = self.experts.sort(experts_XK)
            out_TD = give_back(self.experts(gathering.wait(), gates_XK, slots), group, *bases)
        return out_TD.view_as(shared_SBD)
