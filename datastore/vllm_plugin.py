"""vLLM plugin: gpt-oss as a pooling model whose "pooling" is the reduction to sparse teacher targets.

vLLM loads `register` in each of its processes (entry point group vllm.general_plugins). It acts only when
VPMOE_SCORER=1, which VllmScorer sets. The architecture keeps its name, since vLLM maps quantisation settings by it
(MODELS_CONFIG_MAP in vllm/model_executor/models/config.py). No part of vLLM is patched.

A request's PoolingParams.extra_kwargs holds: `key` (content key), `first` and `count` (the positions to reduce),
`shift` (position in the document minus position in the prompt). Nothing is computed at other positions.
"""

from __future__ import annotations

import os
from collections.abc import Set

import numpy as np
import torch
from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.pooler.common import PoolingParamsUpdate
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM
from vllm.v1.pool.metadata import PoolingMetadata

from datastore.reduce import VocabShard, reduce_hidden
from datastore.target import position_uniforms
from datastore.vllm_scorer import GATE

TASK = "token_classify"
SETTINGS = "vpmoe_scorer"
# What vLLM's memory profiling sends instead of a request: every position is reduced, the largest case.
_PROFILING = {"key": 0, "first": 0, "count": 1 << 31, "shift": 0}


def register() -> None:
    """Entry point. Called once or more in every vLLM process."""
    if os.environ.get(GATE) == "1":
        ModelRegistry.register_model("GptOssForCausalLM", GptOssScorer)


class GptOssScorer(GptOssForCausalLM):
    """gpt-oss with a pooler that sees the final hidden states and the lm_head."""

    is_pooling_model = True
    default_tok_pooling_type = "ALL"

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pooler = TargetPooler(self.lm_head, self.config.vocab_size, vllm_config)


class TargetPooler(Pooler):
    """Reduces the scheduled positions of every request and keeps their packed rows until the prompt is done."""

    def __init__(self, lm_head: nn.Module, vocab_size: int, vllm_config: VllmConfig) -> None:
        super().__init__()
        tp_group = get_tp_group()
        rows = lm_head.weight.shape[0]
        if rows * tp_group.world_size != vocab_size:
            raise ValueError(
                f"the lm_head is padded: {tp_group.world_size} shards of {rows} rows for "
                f"{vocab_size} ids; padded ids would take probability"
            )
        self._lm_head = [lm_head]  # in a list: the weight belongs to the model, not to this module
        self._settings = vllm_config.additional_config[SETTINGS]
        group = tp_group.device_group if tp_group.world_size > 1 else None
        self._shard = VocabShard(first_id=rows * tp_group.rank_in_group, group=group)

    def get_supported_tasks(self) -> Set[str]:
        return {TASK}

    def get_pooling_updates(self, task: str) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> list[torch.Tensor | None]:
        cursor = pooling_metadata.get_pooling_cursor()
        lengths = cursor.num_scheduled_tokens_cpu.tolist()
        ends = cursor.seq_lens_cpu.tolist()
        prompts = cursor.prompt_lens_cpu.tolist()
        spans, realised, uniforms, offset = [], [], [], 0
        for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            params = pooling_metadata.pooling_params[i].extra_kwargs or _PROFILING
            first = max(end - length, params["first"])
            last = max(first, min(end, params["first"] + params["count"]))
            start_row = offset - (end - length)
            spans.append((first + start_row, last + start_row))
            realised.append(_next_tokens(pooling_metadata, i, first, last))
            positions = np.arange(first, last) + params["shift"]
            uniforms.append(position_uniforms(params["key"], positions))
            offset += length
        packed = self._reduce(hidden_states, spans, realised, uniforms)
        sizes = [stop - start for start, stop in spans]
        return [
            _collect(
                pooling_metadata.pooling_states[i].hidden_states_cache,
                rows,
                restarted=end == length,
                finished=end == prompt,
            )
            for i, (rows, length, end, prompt) in enumerate(
                zip(packed.split(sizes), lengths, ends, prompts, strict=True)
            )
        ]

    def _reduce(
        self,
        hidden_states: torch.Tensor,
        spans: list[tuple[int, int]],
        realised: list[torch.Tensor],
        uniforms: list[np.ndarray],
    ) -> torch.Tensor:
        device = hidden_states.device
        return reduce_hidden(
            torch.cat([hidden_states[start:stop] for start, stop in spans]),
            self._lm_head[0].weight,
            torch.cat(realised).to(device),
            torch.from_numpy(np.concatenate(uniforms)).to(device),
            threshold=self._settings["threshold"],
            chunk=self._settings["chunk"],
            shard=self._shard,
        )


def _next_tokens(metadata: PoolingMetadata, request: int, first: int, last: int) -> torch.Tensor:
    ids_T = metadata.prompt_token_ids_cpu[request]
    # Only profiling asks for the position after the last token; its ids are dummies.
    wanted = torch.arange(first + 1, last + 1).clamp(max=len(ids_T) - 1)
    return ids_T[wanted].long()


def _collect(
    kept: list[torch.Tensor], rows: torch.Tensor, *, restarted: bool, finished: bool
) -> torch.Tensor | None:
    """Append rows to those of earlier steps; all of them once the prompt is finished, else None."""
    if restarted:  # a first step, or prefilled anew after preemption: what was kept is stale
        kept.clear()
    kept.append(rows)
    if not finished:
        return None
    whole = torch.cat(kept)
    kept.clear()
    return whole
