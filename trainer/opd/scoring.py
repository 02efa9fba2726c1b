"""Rank 0's way from sampled shards to targets: rollouts to the teacher, its answers into the buffer.

The thread of the teacher's link gives each answer to the buffer's encoder, a process of its own: targets become durable
while the main thread trains, and it only hears how that went.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from datastore.rollout import Rollout
from datastore.rollout_write import score_document
from datastore.rollouts import TargetEncoder
from datastore.types import SparseTarget
from trainer.opd.teacher import TeacherLink

_HELD_OUT = -1  # stands where a shard's number does


class Scoring:
    """The shards in flight at the teacher, and the held-out rollouts of an evaluation."""

    def __init__(self, teacher: TeacherLink, encoder: TargetEncoder) -> None:
        """encoder: of the buffer that the shards are in."""
        self._teacher, self._encoder = teacher, encoder
        self._sent: set[int] = set()
        self._storing: deque[tuple[int, Future[None]]] = deque()
        self._held_out: list[SparseTarget] | None = None

    def sent(self, shard: int) -> bool:
        """Whether the shard is on its way to the teacher or into the buffer."""
        return shard in self._sent

    def send(self, shard: int, rollouts: Sequence[Rollout]) -> None:
        """Hand a shard to the teacher's thread."""
        self._sent.add(shard)
        documents = [score_document(rollout) for rollout in rollouts]
        self._teacher.submit(shard, documents, partial(self._encoder.add_targets, shard))

    def send_held_out(self, rollouts: Sequence[Rollout]) -> None:
        """Hand over the rollouts of an evaluation, one at a time."""
        self._held_out = None
        self._teacher.submit(_HELD_OUT, [score_document(rollout) for rollout in rollouts])

    def collect(self) -> None:
        """Take what is done. Raises what the teacher's thread or the encoder met."""
        while (answer := self._teacher.take()) is not None:
            shard, made = answer
            if shard == _HELD_OUT:
                self._held_out = made
            else:
                self._storing.append((shard, made))
        while self._storing and self._storing[0][1].done():
            shard, stored = self._storing.popleft()
            stored.result()
            self._sent.discard(shard)

    def held_out(self) -> list[SparseTarget] | None:
        """The targets of the evaluation's rollouts, None until they are there."""
        return self._held_out

    def trouble(self) -> str | None:
        """Why nothing comes, for people."""
        storing = f"shard {self._storing[0][0]} is being stored" if self._storing else None
        return self._teacher.trouble() or storing

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
        """Let go of the teacher; the encoder ends with the buffer."""
        self._teacher.close()
