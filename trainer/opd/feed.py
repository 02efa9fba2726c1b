"""The feed of an OPD run: samples ahead, waits for the teacher, gives the step its rows.

Step n trains shard n of the buffer, sampled by the weights of version max(0, n - staleness); while a step trains, the
teacher scores the shards behind it. Rank 0 writes the buffer and talks to the teacher; every rank samples, and reads
its rows from the buffer's folder.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from common.errors import ResumeError, VpmoeError
from datastore.rollout import Rollout, ScoredTokens
from datastore.rollout_reader import RolloutReader
from datastore.rollouts import RolloutBuffer
from datastore.types import DocTarget, PackedRow, SparseTarget
from trainer.batch import Batch, make_batch
from trainer.megatron.topology import Topology
from trainer.megatron.watch import Watch
from trainer.opd.config import OPDConfig
from trainer.opd.data import OPDData
from trainer.opd.measures import rollout_values
from trainer.opd.produce import Producer
from trainer.opd.samples import SampleLog
from trainer.opd.scoring import Scoring
from trainer.opd.shards import ShardPlanner, anchors_before

STATE_VERSION = 1
_POLL_SEC, _TELL_SEC = 0.05, 30.0
_LOG = logging.getLogger(__name__)
_FeedRow = tuple[PackedRow, list[DocTarget | None] | None, list[ScoredTokens] | None]


class OPDFeed:
    """See the top of the file. buffer: the writer on rank 0, a reader elsewhere. scoring, samples: of rank 0 alone."""

    def __init__(
        self,
        config: OPDConfig,
        topology: Topology,
        data: OPDData,
        producer: Producer,
        buffer: RolloutReader,
        scoring: Scoring | None,
        samples: SampleLog | None,
        stored: dict[str, Any] | None,
    ) -> None:
        self.config, self.topology, self.data = config, topology, data
        self.producer, self.buffer, self.scoring = producer, buffer, scoring
        self._samples = samples
        self.step = self._rollout_rows = 0
        self._planner = ShardPlanner(config)
        self._sampled = topology.from_first(buffer.num_sampled)
        if stored is not None:
            self._resume(stored)
        for shard in range(self._sampled):
            self._planner.sampled(buffer.counts(shard).tokens)
        self._rows = 0  # of the step that `next` gave, padding included
        self._seconds = {"sampling": 0.0, "teacher": 0.0}
        self._sampling: dict[str, float] = {}  # of the shard sampled last
        self._log_values: dict[str, float] = {}

    def ready(self, watch: Watch) -> None:
        """Sample what the staleness allows, then wait until the shard of the next step has its targets."""
        began = time.perf_counter()
        self._send_unscored()
        while self._sampled <= min(self.step + self.config.staleness, self.config.steps - 1):
            self._sample(watch)
        sampled = time.perf_counter()
        self.wait_for(lambda: self.buffer.is_scored(self.step), watch, f"shard {self.step}")
        self._seconds = {"sampling": sampled - began, "teacher": time.perf_counter() - sampled}

    def next(self) -> list[Batch]:
        """This rank's micro-batches: rollouts, then rows of the anchor, then padding, cut in order over the ranks."""
        rollout_rows = self.buffer.counts(self.step).rows
        anchors = self._anchors(rollout_rows)
        micro, ranks = self.config.batch.micro_batch_size, self.topology.dp_size
        whole = rollout_rows + len(anchors)
        self._rows = whole + -whole % (micro * ranks)
        mine = self._rows // ranks
        first = self.topology.dp_rank * mine
        rows = self._read(range(first, first + mine), rollout_rows, anchors)
        parts = [rows[start : start + micro] for start in range(0, mine, micro)]
        self._log_values = self._shard_values(rollout_rows, len(anchors))
        return [make_batch(*zip(*part, strict=True)).to(self.topology.device) for part in parts]

    def finished(self) -> None:
        """The step's shard is trained."""
        self._rollout_rows += self.buffer.counts(self.step).rows
        self.step += 1
        if self._samples is not None and self.step % self.config.samples.every == 0:
            shard = self.step - 1
            pairs = zip(self.buffer.rollouts(shard), self.buffer.scored_tokens(shard), strict=True)
            self._samples.write(self.step, itertools.islice(pairs, self.config.samples.count))

    def state(self) -> dict[str, Any]:
        """Shards and rows trained so far; what was sampled is in the buffer."""
        return {
            "version": STATE_VERSION,
            "buffer": self.buffer.buffer.dataset_id,
            "step": self.step,
            "rollout_rows": self._rollout_rows,
        }

    def positions(self) -> int:
        """Positions of the step, padding included."""
        return self._rows * self.data.seq_len

    def values(self) -> dict[str, float]:
        """The step's rollouts, the buffer, and how long the step waited for each part."""
        return self._log_values | {
            f"seconds/{name}": value for name, value in self._seconds.items()
        }

    def close(self) -> None:
        """Let go of the teacher and the buffer."""
        if self.scoring is not None:
            self.scoring.close()
            self._writer().close()

    def scored_apart(self, rollouts: list[Rollout], watch: Watch) -> list[SparseTarget]:
        """Targets of rollouts that are no shard, on rank 0; an empty list elsewhere."""
        if self.scoring is None:
            self.wait_for(lambda: False, watch, "")
            return []
        scoring = self.scoring
        scoring.send_held_out(rollouts)
        self.wait_for(lambda: scoring.held_out() is not None, watch, "the held-out rollouts")
        return scoring.held_out() or []

    def sealed(self) -> bool:
        """Whether the buffer is a finished dataset, on every rank."""
        return self.topology.from_first(self.buffer.is_sealed)

    def seal(
        self, teacher: dict[str, Any], held_out: list[Rollout], targets: list[SparseTarget]
    ) -> None:
        """Make the buffer a dataset, on rank 0."""
        if self.scoring is not None:
            self._writer().seal(teacher, self.data.dataset.manifest, held_out, targets)
        self.topology.barrier()

    def _writer(self) -> RolloutBuffer:
        assert isinstance(self.buffer, RolloutBuffer)
        return self.buffer

    def wait_for(self, holds: Callable[[], bool], watch: Watch, what: str) -> None:
        """Until `holds()` on rank 0, which takes what the teacher has done meanwhile. Every rank calls it.

        Raises RunStopped on every rank for what cannot be mended by waiting, and for a signal.
        """
        told = time.monotonic()
        while True:
            problem, there = None, False
            if self.scoring is not None:
                try:
                    self.scoring.collect()
                    there = holds()
                except VpmoeError as error:
                    problem = str(error).rstrip(".")
            watch.agree(problem)
            if self.topology.from_first(there):
                return
            watch.phase_again()
            if self.scoring is not None:
                time.sleep(_POLL_SEC)
                if time.monotonic() - told > _TELL_SEC:
                    told = time.monotonic()
                    why = self.scoring.trouble() or "the teacher is at work"
                    _LOG.warning("waiting for the targets of %s: %s", what, why)

    def _sample(self, watch: Watch) -> None:
        plan, began = self._planner.plan(), time.perf_counter()
        watch.phase(f"sampling shard {plan.shard}")
        rollouts = self.producer.shard(plan, self.step, lambda done: watch.phase_again())
        seconds = time.perf_counter() - began
        problem, tokens = None, 0
        if self.scoring is not None:
            try:
                self._writer().append(rollouts)
                self.scoring.send(plan.shard, rollouts)
                tokens = self.buffer.counts(plan.shard).tokens
            except VpmoeError as error:
                problem = str(error).rstrip(".")
        watch.agree(problem)
        self._planner.sampled(self.topology.from_first(tokens))
        self._sampled += 1
        self._sampling = {
            "sampling/rollouts_per_sec": self.config.batch.rollouts / seconds,
            "sampling/tokens_per_sec": tokens / seconds,
            "sampling/occupied": self.producer.occupied,
        }

    def _send_unscored(self) -> None:
        """After a stop: what was sampled and has no targets goes to the teacher again."""
        if self.scoring is None:
            return
        for shard in range(self.step, self._sampled):
            if not self.buffer.is_scored(shard) and not self.scoring.sent(shard):
                self.scoring.send(shard, self.buffer.rollouts(shard))

    def _anchors(self, rollout_rows: int) -> range:
        """Numbers of the step's anchor rows, in their endless order."""
        share = self.config.anchor_share
        first = anchors_before(self._rollout_rows, share)
        return range(first, anchors_before(self._rollout_rows + rollout_rows, share))

    def _read(self, numbers: range, rollout_rows: int, anchors: range) -> list[_FeedRow]:
        """The rows of the step with these numbers, and no others: `numbers` of rollouts, anchors and padding."""
        whole = rollout_rows + len(anchors)
        scored = range(numbers.start, min(numbers.stop, rollout_rows))
        rows: list[_FeedRow] = [
            (row.row, row.documents, row.sampled)
            for row in (self.buffer.rows(self.step, scored) if scored else [])
        ]
        for number in range(numbers.start + len(rows), numbers.stop):
            row = (
                self.data.anchor(anchors[number - rollout_rows])
                if number < whole
                else _padding(self.data.seq_len)
            )
            rows.append((row, None, None))
        return rows

    def _shard_values(self, rollout_rows: int, anchor_rows: int) -> dict[str, float]:
        if self.scoring is None:
            return {}
        shard = self.step
        rollouts = self.buffer.rollouts(shard)
        later = range(shard + 1, self._sampled)
        ahead = sum(self.buffer.counts(number).tokens for number in later)
        return (
            rollout_values(rollouts, "rollouts")
            | self._sampling
            | {
                "buffer/depth": float(self._sampled - shard),
                "buffer/scored": float(self.buffer.num_scored - shard),
                "buffer/age": float(shard - rollouts[0].policy_version),
                "buffer/rows": float(rollout_rows),
                "buffer/anchor_rows": float(anchor_rows),
                "opd/tokens": float(self._planner.tokens - ahead),
                **self.scoring.values(),
            }
        )

    def _resume(self, stored: dict[str, Any]) -> None:
        wanted = {"version": STATE_VERSION, "buffer": self.buffer.buffer.dataset_id}
        found = {key: stored.get(key) for key in wanted}
        if found != wanted or self._sampled < stored["step"]:
            raise ResumeError(
                f"the checkpoint does not belong to the buffer {self.buffer.folder}",
                got=f"{found}, shards {self._sampled}",
                expected=f"{wanted}, at least {stored['step']} shards",
                remedy="put the buffer of this run back, or start a new run with init_from",
            )
        self.step, self._rollout_rows = stored["step"], stored["rollout_rows"]


def _padding(seq_len: int) -> PackedRow:
    """A row without documents: nothing in it is computed into any sum."""
    return PackedRow(
        tokens_T=np.full(seq_len, 199_999, np.int32),
        spans_T=np.zeros(seq_len, np.uint8),
        doc_ends_D=np.empty(0, np.int32),
        doc_ids=(),
        languages=(),
        exercises=(),
        row_hash=0,
    )
