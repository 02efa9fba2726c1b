"""An engine for the score stage without vLLM: the teacher in transformers, in this process, for small teachers.

Hidden states come from transformers' gpt-oss (eager attention), the reduction at the lm_head from datastore/reduce.py,
so pieces, codec, budgets, gates and manifest are those of any scoring. `start_engine` is what `score_dataset` takes as
`start`. The canary's reference is made by transformers too (on the CPU), so here it proves the reduction and the
device, not the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import device_name
from common.errors import EngineError
from common.provenance import package_versions
from datastore.canary import require_canary
from datastore.canary_reference import load_network
from datastore.packed import has_nan, packed_width, unpack
from datastore.prompt import ScoreRequest
from datastore.reduce import VocabShard, reduce_hidden
from datastore.score_job import ScoreRun
from datastore.target import position_uniforms
from datastore.teacher import TeacherConfig, local_model
from datastore.types import SparseTarget


class TorchScorer:
    """A running teacher: `score` and `score_packed` as datastore/vllm_scorer.py has them."""

    def __init__(self, teacher: TeacherConfig, model: Path) -> None:
        self._teacher = teacher
        self._device = torch.device(teacher.engine.device)
        self._network = load_network(teacher, model).to(self._device)
        self._head_VD = self._network.get_output_embeddings().weight.detach()

    def score(self, requests: list[ScoreRequest]) -> list[SparseTarget]:
        """Targets in document coordinates, in the order of `requests`. Raises EngineError where there is a NaN."""
        targets = []
        for packed_PC, request in zip(self.score_packed(requests), requests, strict=True):
            if has_nan(packed_PC):
                raise EngineError(
                    f"the teacher gives NaN for the document {request.content_key:016x}"
                )
            targets.append(unpack(packed_PC, request.positions_P, self._teacher.threshold))
        return targets

    def score_packed(self, requests: list[ScoreRequest]) -> list[np.ndarray]:
        """Packed rows int32 [P, packed_width] of each request (datastore/packed.py); longest documents first."""
        empty_PC = np.empty((0, packed_width(self._teacher.threshold)), np.int32)
        packed = [empty_PC] * len(requests)
        with torch.inference_mode():
            for chosen in self._batches(requests):
                rows = self._score_batch([requests[i] for i in chosen])
                for i, rows_PC in zip(chosen, rows, strict=True):
                    packed[i] = rows_PC
        return packed

    def _batches(self, requests: list[ScoreRequest]) -> Iterator[list[int]]:
        """Requests of like length, at most max_num_batched_tokens together once padded, and one at least."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_T))
        order = [i for i in order if len(requests[i].positions_P)]
        while order:
            longest = len(requests[order[0]].prompt_T)
            size = max(1, self._teacher.engine.max_num_batched_tokens // longest)
            yield order[:size]
            order = order[size:]

    def _score_batch(self, requests: list[ScoreRequest]) -> list[np.ndarray]:
        """Padded on the right, where a causal model does not look."""
        length = max(len(request.prompt_T) for request in requests)
        prompts_BT = np.zeros((len(requests), length), np.int64)
        for row, request in zip(prompts_BT, requests, strict=True):
            row[: len(request.prompt_T)] = request.prompt_T
        tokens_BT = torch.from_numpy(prompts_BT).to(self._device)
        hidden_BTD = self._network.base_model(tokens_BT, use_cache=False).last_hidden_state
        columns = [request.positions_P.astype(np.int64) - request.shift for request in requests]
        counts = [len(column) for column in columns]
        rows_N = np.repeat(np.arange(len(requests)), counts)
        columns_N = np.concatenate(columns)
        uniforms_N = np.concatenate(
            [position_uniforms(request.content_key, request.positions_P) for request in requests]
        )
        packed_NC = reduce_hidden(
            hidden_BTD[self._sent(rows_N), self._sent(columns_N)],
            self._head_VD,
            self._sent(prompts_BT[rows_N, columns_N + 1]),
            self._sent(uniforms_N),
            threshold=self._teacher.threshold,
            chunk=self._teacher.engine.vocab_chunk_tokens,
            shard=VocabShard(),
        )
        return np.split(packed_NC.cpu().numpy(), np.cumsum(counts)[:-1])

    def _sent(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)

    def identity(self) -> dict[str, Any]:
        """What ran, for the manifest."""
        return {
            "program": "transformers, in process (benchmarks/torch_teacher.py)",
            "versions": package_versions(("torch", "transformers")),
            "device": device_name(str(self._device)),
            "attention_backend": "eager",
            "moe_backend": "eager",
        }

    def close(self) -> None:
        """Nothing runs beside it."""


def start_engine(run: ScoreRun) -> tuple[TorchScorer, dict[str, Any]]:
    """The run's teacher in torch, once it gives its canary's values. Raises EngineError when it does not."""
    model = local_model(run.teacher)
    scorer = TorchScorer(run.teacher, model)
    canary = require_canary(scorer, run.teacher, model, weights=run.weights)
    return scorer, {"engine": scorer.identity(), "canary": canary}
