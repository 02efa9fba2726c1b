"""Rank 0's way from sampled shards to targets: rollouts to the teacher, its answers into the buffer."""

from __future__ import annotations

from collections.abc import Sequence

from datastore.rollout import Rollout
from datastore.rollout_write import score_document
from datastore.rollouts import RolloutBuffer
from datastore.types import SparseTarget
from trainer.opd.teacher import TeacherLink

_HELD_OUT = -1  # stands where a shard's number does


class Scoring:
    """The shards in flight at the teacher, and the held-out rollouts of an evaluation."""

    def __init__(self, teacher: TeacherLink, buffer: RolloutBuffer) -> None:
        self._teacher, self._buffer = teacher, buffer
        self._sent: set[int] = set()
        self._held_out: list[SparseTarget] | None = None

    def sent(self, shard: int) -> bool:
        """Whether the shard is on its way."""
        return shard in self._sent

    def send(self, shard: int, rollouts: Sequence[Rollout]) -> None:
        """Hand a shard to the teacher's thread."""
        self._sent.add(shard)
        self._teacher.submit(shard, [score_document(rollout) for rollout in rollouts])

    def send_held_out(self, rollouts: Sequence[Rollout]) -> None:
        """Hand over the rollouts of an evaluation, one at a time."""
        self._held_out = None
        self.send(_HELD_OUT, rollouts)

    def collect(self) -> None:
        """Put what the teacher has answered into the buffer. Raises what its thread met."""
        while (answer := self._teacher.take()) is not None:
            shard, targets = answer
            if shard == _HELD_OUT:
                self._held_out = targets
            else:
                self._buffer.add_targets(shard, targets)
            self._sent.discard(shard)

    def held_out(self) -> list[SparseTarget] | None:
        """The targets of the evaluation's rollouts, None until they are there."""
        return self._held_out

    def trouble(self) -> str | None:
        """Why nothing comes, for people."""
        return self._teacher.trouble()

    def values(self) -> dict[str, float]:
        """What the teacher has done since this process began: teacher/documents, /tokens, /request_sec, /away_sec."""
        figures = self._teacher.figures()
        return {
            "teacher/documents": float(figures.documents),
            "teacher/tokens": float(figures.tokens),
            "teacher/request_sec": figures.request_sec,
            "teacher/away_sec": figures.away_sec,
        }

    def close(self) -> None:
        """Let go of the teacher."""
        self._teacher.close()
