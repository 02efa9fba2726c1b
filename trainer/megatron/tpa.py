"""TPA: the query-key-value projection of local layers as products of factors (arXiv 2501.06425, sec. 3.1).

For a token x, with H query heads, G key-value heads and head dim c:

    Q = A_Q(x) B_Q(x) / R_Q,   A_Q [H, R_Q], B_Q [R_Q, c];   K = A_K B_K / R,   V = A_V B_V / R,   A_K, A_V [G, R]

the six maps linear in x and without bias; one bias vector is added to Q, K, V together, before QK-norm and rotary.
The factors are not cached at inference (QK-norm lies between them and the rotation), so K and V are materialised.

Tensor parallelism splits A by heads. B serves all heads, so every rank computes it over the whole rows and its
gradient is summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

_SPLIT = ("a_query", "a_key", "a_value", "bias")


class TPAProjection(MegatronModule):
    """The `linear_qkv` of Megatron's SelfAttention.

    a_query [H * RQ, D], a_key, a_value [G * R, D] (rows head by head; H and G of this rank); b_query [RQ * c, D],
    b_key, b_value [R * c, D] (rows rank by rank); bias [(H + 2 G) * c] in Megatron's order, group by group
    [q .. q k v]. Initial values are drawn whole and sliced, so they do not depend on the tensor-parallel size.
    """

    def __init__(
        self,
        hidden: int,
        out: int,
        *,
        config: TransformerConfig,
        q_rank: int,
        kv_rank: int,
        tp_group: Any,
        init_method: Callable[[torch.Tensor], Any],
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.q_rank, self.kv_rank = q_rank, kv_rank
        self.groups = config.num_query_groups // tp_group.size()
        self.queries = config.num_attention_heads // config.num_query_groups
        heads, groups, c = config.num_attention_heads, config.num_query_groups, config.kv_channels
        self.a_query = self._parameter((heads * q_rank, hidden), init_method)
        self.a_key = self._parameter((groups * kv_rank, hidden), init_method)
        self.a_value = self._parameter((groups * kv_rank, hidden), init_method)
        self.b_query = self._parameter((q_rank * c, hidden), init_method, split=False)
        self.b_key = self._parameter((kv_rank * c, hidden), init_method, split=False)
        self.b_value = self._parameter((kv_rank * c, hidden), init_method, split=False)
        self.bias = self._parameter((out,), torch.nn.init.zeros_)

    def forward(self, x_SBD: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[S, B, D], under sequence parallelism this rank's S, to [S, B, (H + 2 G) * c] of the whole rows; no bias
        is left to add.
        """
        if self.config.sequence_parallel:
            x_SBD = gather_from_sequence_parallel_region(x_SBD, group=self.tp_group)
        maps = (self.a_query, self.a_key, self.a_value, self.b_query, self.b_key, self.b_value)
        factors = torch.nn.functional.linear(x_SBD, torch.cat(maps))
        *a, b_SBX = factors.split([*(len(one) for one in maps[:3]), sum(map(len, maps[3:]))], -1)
        b_SBRC = b_SBX.unflatten(-1, (-1, self.config.kv_channels))
        return (self._all_a(*a) @ b_SBRC).flatten(2) + self.bias, None

    def _all_a(
        self, query_SBX: torch.Tensor, key_SBX: torch.Tensor, value_SBX: torch.Tensor
    ) -> torch.Tensor:
        """[S, B, H + 2 G, RQ + 2 R]: rows in Megatron's order, each zero outside its own ranks.

        So one batched product writes Q, K and V where SelfAttention looks for them. With the zeros it is 2.4 times as
        large, still one percent of the six maps, and two passes over the result are saved.
        """
        RQ, R = self.q_rank, self.kv_rank
        query = (query_SBX / RQ).unflatten(-1, (self.groups, self.queries, RQ))
        key = (key_SBX / R).unflatten(-1, (self.groups, 1, R))
        value = (value_SBX / R).unflatten(-1, (self.groups, 1, R))
        pad = torch.nn.functional.pad
        rows = [pad(query, (0, 2 * R)), pad(key, (RQ, R)), pad(value, (RQ + R, 0))]
        return torch.cat(rows, dim=-2).flatten(2, 3)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """A and bias split over TP on their first axis, B on every rank."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            dict.fromkeys(_SPLIT, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )

    def _parameter(
        self,
        shape: tuple[int, ...],
        init: Callable[[torch.Tensor], Any],
        split: bool = True,
    ) -> torch.nn.Parameter:
        config, group = self.config, self.tp_group
        whole = torch.empty(*shape, device=torch.cuda.current_device())
        if config.perform_initialization:
            init(whole)
        own = whole.chunk(group.size())[group.rank()] if split else whole
        parameter = torch.nn.Parameter(own.to(config.params_dtype).clone())
        if split:
            parameter.tensor_model_parallel = True
            parameter.partition_dim, parameter.partition_stride = 0, 1
        else:
            parameter.sequence_parallel = config.sequence_parallel
        return parameter
