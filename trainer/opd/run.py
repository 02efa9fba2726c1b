"""`vpmoe-train opd`: the student samples, the teacher scores, the trainer moves the student, step after step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datastore.rollout import Rollout, ScoredTokens
from datastore.rollout_reader import RolloutReader
from datastore.rollouts import RolloutBuffer
from datastore.types import SparseTarget
from trainer.megatron.sampler import Sampler, require_layout
from trainer.megatron.topology import Topology
from trainer.megatron.watch import Watch
from trainer.opd.config import OPDConfig
from trainer.opd.data import OPDData
from trainer.opd.feed import OPDFeed
from trainer.opd.lines import eval_line, step_line
from trainer.opd.measures import reverse_kl_values, rollout_values
from trainer.opd.produce import Producer
from trainer.opd.samples import SampleLog
from trainer.opd.scoring import Scoring
from trainer.opd.teacher import TeacherLink, gate_documents
from trainer.opd.together import work_of_first
from trainer.provenance import shaping
from trainer.run import RunLog
from trainer.training import TrainingRun, guarded

_LOG = logging.getLogger(__name__)


def run_opd(config: OPDConfig) -> None:
    """Train until `steps`; the same command goes on where a killed one was saved. Every rank calls it."""
    require_layout(config)
    with guarded(config) as (topology, watch):
        OPDRun(config, topology, watch).train(watch)


class _HeldOut(NamedTuple):
    """Of one evaluation, on rank 0; empty elsewhere."""

    rollouts: list[Rollout]
    targets: list[SparseTarget]


class OPDRun(TrainingRun):
    """A run over rollouts. Who the teacher is, and that it is aligned, is seen before anything is made."""

    config: OPDConfig

    def __init__(self, config: OPDConfig, topology: Topology, watch: Watch) -> None:
        self.config, self._watch = config, watch
        self.data = OPDData.open(config)
        self._link: TeacherLink | None = None
        if topology.rank == 0:
            self._link = TeacherLink(config.teacher, self.data.render, seq_len=self.data.seq_len)
        watch.phase("waiting for the teacher")
        self.teacher = work_of_first(self._admitted if self._link else None, topology, watch)
        manifest = self.data.dataset.manifest
        found = {
            "dataset": manifest.fingerprint,
            "tokenizer": manifest.tokenizer.ranks_sha256,
            "teacher": self.teacher["teacher_id"],
        }
        super().__init__(config, topology, self.data.seq_len, found)
        sampler = Sampler(self.trainer.student, config, topology, self.data.seq_len)
        self._producer = Producer(config, self.data, sampler, topology)
        self._held_out: _HeldOut | None = None

    @property
    def eval_every(self) -> int:
        return self.config.eval.every

    def feed(self, stored: dict[str, Any] | None, log: RunLog) -> OPDFeed:
        folder = self.folder / "buffer"
        writer: list[RolloutBuffer] = []
        first = self.topology.rank == 0
        work_of_first(
            (lambda poll: writer.append(self._buffer(folder))) if first else None,
            self.topology,
            self._watch,
        )
        return OPDFeed(
            self.config,
            self.topology,
            self.data,
            self._producer,
            writer[0] if first else RolloutReader.open_reader(folder),
            Scoring(self._link, writer[0].encoder()) if self._link else None,
            SampleLog(self.folder, log, resumed_step=stored["step"] if stored else 0)
            if first
            else None,
            stored,
        )

    def evaluate(self, feed: OPDFeed, watch: Watch) -> dict[str, float]:
        """Rollouts of the held-out prompts under the weights of now: validity, lengths, reverse KL to the teacher."""
        self._held_out = self._sampled_held_out(feed, watch)
        if not self._held_out.rollouts:
            return {}
        pairs = [
            (
                rollout,
                ScoredTokens(
                    sampling_logprob_S=rollout.logprobs_S,
                    teacher_logprob_S=target.realised_logprob_P,
                ),
            )
            for rollout, target in zip(*self._held_out, strict=True)
        ]
        return rollout_values(self._held_out.rollouts, "eval") | reverse_kl_values(pairs, "eval")

    def finish(self, feed: OPDFeed, watch: Watch) -> None:
        """The buffer becomes a dataset: its train split is what was trained, its valid split the last evaluation."""
        if feed.sealed():
            return
        held_out = self._held_out or self._sampled_held_out(feed, watch)
        teacher = self.teacher | (self._link.served if self._link else {})
        feed.seal(teacher, held_out.rollouts, held_out.targets)
        _LOG.info(
            "%s is a dataset now, with the targets of %s",
            feed.buffer.folder,
            self.config.teacher.name,
        )

    def step_line(self, step: int, values: dict[str, float]) -> str:
        return step_line(step, self.config.steps, values)

    def eval_line(self, step: int, values: dict[str, float]) -> str:
        return eval_line(step, values)

    def _admitted(self, poll: Callable[[], None]) -> dict[str, Any]:
        """What identifies the teacher, once it has answered and passed the alignment gate."""
        assert self._link is not None
        identity = self._link.open(poll)
        documents = gate_documents(self.data.dataset, self.config.teacher.gate_documents)
        self._link.gate(documents, poll)
        return identity

    def _buffer(self, folder: Path) -> RolloutBuffer:
        identity = {**shaping(self.provenance), "teacher": self.teacher}
        return RolloutBuffer.open(
            folder,
            identity,
            seq_len=self.data.seq_len,
            slug=self.config.teacher.name,
            threshold=self.teacher["threshold"],
        )

    def _sampled_held_out(self, feed: OPDFeed, watch: Watch) -> _HeldOut:
        rollouts = self._producer.held_out(feed.step, lambda done: watch.phase_again())
        targets = feed.scored_apart(rollouts, watch)
        return _HeldOut(rollouts, targets)
