"""vLLM plugin: gpt-oss as a pooling model whose "pooling" is the reduction to sparse teacher targets.

vLLM loads `register` in each of its processes (entry point group vllm.general_plugins). It acts only when
VPMOE_SCORER=1, which VllmScorer sets. The architecture keeps its name, since vLLM maps quantisation settings by it
(MODELS_CONFIG_MAP in vllm/model_executor/models/config.py). No part of vLLM is patched.

A request's PoolingParams.extra_kwargs holds: `key` (content key), `first` and `count` (the positions to reduce),
`shift` (position in the document minus position in the prompt). No logits are computed at other positions.

Prefix caching is on: the constant opening of a document is computed once. A scored position that was read from the
cache has no hidden state, so a request whose cached prefix reaches into its scored positions comes back short, and
VllmScorer sends it again without the cache.
"""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass

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
from datastore.vllm_scorer import GATE, SETTINGS, TASK

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
        steps = _steps(
            cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist(), pooling_metadata
        )
        packed = self._reduce(hidden_states, steps, pooling_metadata).split(
            [step.last - step.first for step in steps]
        )
        prompts = cursor.prompt_lens_cpu.tolist()
        return [
            _collect(
                pooling_metadata.pooling_states[i].hidden_states_cache,
                rows,
                is_first=step.is_first,
                is_finished=step.end == prompts[i],
            )
            for i, (rows, step) in enumerate(zip(packed, steps, strict=True))
        ]

    def _reduce(
        self, hidden_states: torch.Tensor, steps: list[_Step], metadata: PoolingMetadata
    ) -> torch.Tensor:
        """Packed rows of all requests of the step, in host memory: one copy there and one back."""
        realised_N = torch.cat([_next_tokens(metadata, i, step) for i, step in enumerate(steps)])
        keys_N = np.repeat(
            np.array([step.key for step in steps], np.uint64),
            [step.last - step.first for step in steps],
        )
        positions_N = np.concatenate(
            [np.arange(step.first, step.last) + step.shift for step in steps]
        )
        uniforms_N = torch.from_numpy(position_uniforms(keys_N, positions_N))
        device = hidden_states.device
        packed_NC = reduce_hidden(
            torch.cat(
                [hidden_states[step.row : step.row + step.last - step.first] for step in steps]
            ),
            self._lm_head[0].weight,
            _sent(realised_N, device),
            _sent(uniforms_N, device),
            threshold=self._settings["threshold"],
            chunk=self._settings["chunk"],
            shard=self._shard,
        )
        return _returned(packed_NC)


@dataclass(frozen=True, slots=True)
class _Step:
    """What of a request this step computes. first, last: positions of the prompt to reduce; end: computed so far.

    row: row of `first` in the step's hidden states. is_first: no scored position was computed in an earlier step.
    """

    key: int
    first: int
    last: int
    shift: int
    end: int
    row: int
    is_first: bool


def _steps(lengths: list[int], ends: list[int], metadata: PoolingMetadata) -> list[_Step]:
    steps, offset = [], 0
    for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        params = metadata.pooling_params[i].extra_kwargs or _PROFILING
        start = end - length
        first = max(start, params["first"])
        last = max(first, min(end, params["first"] + params["count"]))
        steps.append(
            _Step(
                key=params["key"],
                first=first,
                last=last,
                shift=params["shift"],
                end=end,
                row=offset + min(first, end) - start,
                is_first=start <= params["first"],
            )
        )
        offset += length
    return steps


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`; from pageable memory it would wait for all that was launched before."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _returned(values: torch.Tensor) -> torch.Tensor:
    """The values in host memory, page-locked beside CUDA: 7 MB a step of 16k tokens, once, and the step's only wait."""
    if values.device.type != "cuda":
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return host


def _next_tokens(metadata: PoolingMetadata, request: int, step: _Step) -> torch.Tensor:
    ids_T = metadata.prompt_token_ids_cpu[request]
    # Only profiling asks for the position after the last token; its ids are dummies.
    wanted = torch.arange(step.first + 1, step.last + 1).clamp(max=len(ids_T) - 1)
    return ids_T[wanted].long()


def _collect(
    kept: list[torch.Tensor], rows: torch.Tensor, *, is_first: bool, is_finished: bool
) -> torch.Tensor | None:
    """Append rows to those of earlier steps; all of them once the prompt is finished, else None."""
    if is_first:  # also when prefilled anew after preemption: what was kept is stale
        kept.clear()
    kept.append(rows)
    if not is_finished:
        return None
    whole = torch.cat(kept)  # a copy: the page-locked memory of the step goes back
    kept.clear()
    return whole
