"""Sampling for one shard of the buffer: every data-parallel rank its share of the rollouts, rank 0 gets them all."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
import xxhash

from datastore.prompts import Prompt
from datastore.rollout import Reasoning, Rollout
from trainer.megatron.sampler import Sample, SamplePrompt, Sampler
from trainer.megatron.topology import Topology
from trainer.opd.config import OPDConfig
from trainer.opd.curriculum import Curriculum
from trainer.opd.data import OPDData
from trainer.opd.shards import ShardPlan

_KEY = struct.Struct("<B3xIQQ")  # kind of prompt, sample, seed, prompt
_TRAIN, _HELD_OUT = 0, 1


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One rollout to sample. number: of its prompt in the run's order, or of the held-out document."""

    number: int
    sample: int
    prompt: Prompt
    reasoning: Reasoning
    key: int


class Producer:
    """Samples rollouts with the weights of now. Every rank calls its methods at the same place."""

    def __init__(
        self, config: OPDConfig, data: OPDData, sampler: Sampler, topology: Topology
    ) -> None:
        self._config, self._data, self._sampler, self._topology = config, data, sampler, topology
        self._curriculum = Curriculum(config.curriculum)

    @property
    def occupied(self) -> float:
        """Mean share of this rank's slots that sampled, over the steps of the last call."""
        report = self._sampler.report
        return report.occupied if report else 0.0

    def shard(
        self, plan: ShardPlan, version: int, progress: Callable[[int], None]
    ) -> list[Rollout]:
        """The rollouts of a shard in order of prompt and sample, on rank 0; an empty list on the others.

        version: optimizer steps that the weights have seen. progress: told this rank's sampled tokens so far, often.
        Raises what `Sampler.sample` does, and FormatError for a document that gives no prompt.
        """
        prompts_P = np.arange(plan.first_prompt, plan.first_prompt + plan.prompts)
        modes = self._curriculum.reasoning(self._config.curriculum[plan.stage], prompts_P)
        documents_P = self._data.documents_of(prompts_P)
        jobs = [
            self._job(_TRAIN, number, sample, self._data.prompts.prompt(document), mode)
            for number, document, mode in zip(
                prompts_P.tolist(), documents_P.tolist(), modes, strict=True
            )
            for sample in range(plan.rollouts_per_prompt)
        ]
        return self._sampled(jobs, version, progress)

    def held_out(self, version: int, progress: Callable[[int], None]) -> list[Rollout]:
        """Rollouts of each held-out prompt, with the same random numbers every time, on rank 0; else as `shard`.

        Their number is that of the document in the valid split, their effort the dataset's own.
        """
        config, mode = self._config.eval, self._data.render.reasoning
        jobs = [
            self._job(_HELD_OUT, number, sample, self._data.held_out.prompt(number), mode)
            for number in range(config.prompts)
            for sample in range(config.rollouts_per_prompt)
        ]
        return self._sampled(jobs, version, progress)

    def _job(self, kind: int, number: int, sample: int, prompt: Prompt, mode: Reasoning) -> _Job:
        key = xxhash.xxh3_64_intdigest(_KEY.pack(kind, sample, self._config.seed, number))
        return _Job(number=number, sample=sample, prompt=prompt, reasoning=mode, key=key)

    def _sampled(
        self, jobs: Sequence[_Job], version: int, progress: Callable[[int], None]
    ) -> list[Rollout]:
        topology = self._topology
        mine = jobs[topology.dp_rank :: topology.dp_size]
        samples = self._sampler.sample(
            [SamplePrompt(tokens_T=job.prompt.tokens_T, key=job.key) for job in mine], progress
        )
        every: list[list[Sample]] = [samples] * topology.dp_size
        if topology.dp_size > 1:
            dist.all_gather_object(every, samples, group=topology.dp_group)
        if topology.rank:
            return []
        return [
            _rollout(job, every[place % topology.dp_size][place // topology.dp_size], version)
            for place, job in enumerate(jobs)
        ]


def _rollout(job: _Job, sample: Sample, version: int) -> Rollout:
    prompt = job.prompt
    return Rollout(
        prompt=job.number,
        sample=job.sample,
        doc_id=prompt.doc_id,
        language=prompt.language,
        exercise=prompt.exercise,
        tokens_T=np.concatenate([prompt.tokens_T, sample.tokens_S]).astype(np.int32),
        spans_T=np.concatenate(
            [np.zeros(len(prompt.tokens_T), np.uint8), sample.spans_S.astype(np.uint8)]
        ),
        logprobs_S=sample.logprobs_S.astype(np.float32),
        policy_version=version,
        reasoning=job.reasoning,
        verdict=str(sample.verdict),
    )
