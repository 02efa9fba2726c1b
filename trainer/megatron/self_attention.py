"""The value residual (arXiv 2410.17897): v_l <- lam_l v_l + (1 - lam_l) v_1 from layer 2 on, lam_l = sigmoid(logit_l).

v_1 are the values of layer 1 as projected, bias included, never mixed ones. Queries and keys stay as they are; values
are not rotated, so it does not matter on which side of the rotation they are mixed.

v_1 travels as Megatron's `context`: a layer returns (hidden, context), TransformerBlock passes it on, and its full
recompute makes it an input of every checkpoint (transformer/transformer_block.py:520), so gradients reach layer 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from common.errors import EngineError
from trainer.megatron.keep_fp32 import KeepsFP32

_CLAMP = 1e-4


class ValueResidualAttention(KeepsFP32, SelfAttention):
    """SelfAttention that mixes the first layer's values into its own.

    value_residual_logit [1], fp32 also in a bf16 model; layer 1 has none. init: lam at the start, kept within
    [1e-4, 1 - 1e-4]. first_value_SBGD: v_1 during a forward pass, given and taken by ValueResidualLayer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *,
        init: float,
        **keywords: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **keywords)
        self.first_value_SBGD: torch.Tensor | None = None
        if layer_number > 1:
            lam = min(max(init, _CLAMP), 1 - _CLAMP)
            logit = torch.full((1,), math.log(lam / (1 - lam)), device=torch.cuda.current_device())
            self.value_residual_logit = torch.nn.Parameter(logit)
            # Every tensor-parallel rank mixes the values of its own groups: this has their gradients summed.
            self.value_residual_logit.sequence_parallel = config.sequence_parallel

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """query [S, B, H, C], key and value [S, B, G, C]. Raises EngineError where a later layer got no v_1."""
        query, key, value = super().get_query_key_value_tensors(
            hidden_states, *arguments, **keywords
        )
        if self.layer_number == 1:
            self.first_value_SBGD = value.contiguous()
            return query, key, self.first_value_SBGD
        if self.first_value_SBGD is None:
            raise EngineError(
                f"layer {self.layer_number} mixes in the values of layer 1 and got none",
                remedy="run it inside the student's TransformerBlock, which carries them from layer 1 on",
            )
        logit = self.value_residual_logit
        mixed = torch.sigmoid(logit) * value + torch.sigmoid(-logit) * self.first_value_SBGD
        return query, key, mixed.to(value.dtype)


class ValueResidualLayer(TransformerLayer):
    """TransformerLayer that takes v_1 as `context` and returns it beside its output."""

    def _forward_attention(
        self, *arguments: Any, context: torch.Tensor | None = None, **keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention = self.self_attention
        attention.first_value_SBGD = context
        hidden_SBD, _ = super()._forward_attention(*arguments, **keywords)
        context, attention.first_value_SBGD = attention.first_value_SBGD, None
        return hidden_SBD, context
