"""The mixture-of-experts layer: the routed tokens are moved by indices, and the host waits for nothing.

Each token has K slots, one for each of its experts. Slots are sorted by expert (stable, so in order of tokens), the
experts run on the rows of their slots, and the outputs are summed over K. On a CPU rows are gathered and summed by
dispatch.py; on CUDA the experts' kernels read and write rows where they lie (trainer/kernels).

With expert parallelism every rank of the group gets all tokens and sorts those of its own experts (exchange.py); the
shared expert is computed while rows are on their way. EP groups may span tensor-parallel ranks, which hold slices of
the rows.

Why not Megatron-Core 0.16.1's MoELayer: its dispatchers go through [tokens, experts] maps, synchronise with the host
(transformer/moe/token_dispatcher.py), and the alltoall one hands tensors to gloo where it wants integers, so that CPU
tests could not run the path that GPUs run.

Shapes: S, B, D hidden states, T = S * B tokens, K slots a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from trainer.megatron.crossing import Crossing, GatheredRows
from trainer.megatron.exchange import Exchange, exchange_over
from trainer.megatron.experts import Compute, RoutedExperts, SharedExpert
from trainer.megatron.router import StudentRouter

if TYPE_CHECKING:  # triton is on CUDA alone
    from trainer.kernels.norm import Unsummed

# What the shared expert makes of the tokens, and the residual where the layer has it added here, [S, B, D].
Shared = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]


class StudentMoE(MegatronModule):
    """Routed experts and the shared one; takes the `mlp` slot of a TransformerLayer.

    submodules: linear layers of the shared expert. compute: how routing and routed experts are computed. exchange:
    between the ranks of the expert-parallel group, one for all layers; None: one of its own, if the group has ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        compute: Compute,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__(config)
        groups = get_default_pg_collection()
        self._exchange, self._gathered = exchange or exchange_over(groups.ep), GatheredRows()
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
        shared = lambda: (self.shared_experts(hidden_SBD), None)  # noqa: E731
        return self.routed(hidden_SBD, padding_mask, shared), None

    def unsummed(self) -> Unsummed | Crossing | None:
        """For one pass: what takes the routed experts' gradients of x by slots; None where autograd has them."""
        if self.experts.compute != "triton":
            return None
        if self._exchange is not None:
            return Crossing(self._exchange, self._gathered)
        from trainer.kernels.norm import Unsummed

        return Unsummed()

    def routed(
        self,
        x_SBD: torch.Tensor,
        padding_mask: torch.Tensor | None,
        shared: Shared,
        *,
        router_x_SBD: torch.Tensor | None = None,
        unsummed: Unsummed | Crossing | None = None,
    ) -> torch.Tensor:
        """The sum of what `shared` gives and of what the routed experts make of x, [S, B, D].

        router_x: x for the router, where it is given once for each reader. unsummed: of `unsummed`, where it is what
        takes the gradients of x. With expert parallelism all ranks of the group bring as many tokens.
        """
        x_TD, padding_SB = x_SBD.flatten(0, 1), None if padding_mask is None else padding_mask.t()
        router_x = x_SBD if router_x_SBD is None else router_x_SBD

        def bases() -> list[torch.Tensor]:
            return [t.flatten(0, 1) for t in shared() if t is not None]

        if self._exchange is None:
            added = bases()
            gates_TK, experts_TK = self.router(router_x, padding_SB)
            slots = self.experts.sort(experts_TK)
            out_TD = self.experts(x_TD, gates_TK, slots, *added, unsummed=unsummed)
            return out_TD.view_as(x_SBD)
        crossing = unsummed or Crossing(self._exchange)
        gathered = crossing.gather(x_TD)  # on its way while experts are chosen
        choices = self.router(router_x, padding_SB, crossing.send_choices)
        gates_XK, experts_XK = crossing.gathered_choices(*choices)
        slots = self.experts.sort(experts_XK)
        sums_XD = self.experts(
            *(gathered(), gates_XK, slots), unsummed=unsummed, send=crossing.send
        )
        return crossing.give_back(sums_XD, bases).view_as(x_SBD)
