"""The one place where a trainer talks to its teacher, a `vpmoe-data serve` at an address (docs/serve.md).

Rank 0 holds a TeacherLink. All of HTTP is in a thread of its own, one request at a time: no call of the training
thread waits for the network but `open` and `gate`, which are made before the first step.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from common.errors import EngineError, FormatError
from datastore.alignment import AlignmentReport, alignment_report, require_aligned
from datastore.harmony import RenderConfig
from datastore.reader import Dataset
from datastore.scoring_client import (
    DocumentFailed,
    DocumentRefused,
    NoAnswer,
    ScoreDocument,
    ScoringClient,
)
from datastore.types import SparseTarget
from trainer.opd.config import TeacherServerConfig
from trainer.opd.teacher_identity import (
    SERVED_KEYS,
    STABLE_KEYS,
    longest_shown,
    require_same,
    require_teacher,
    shown,
)

_FIRST_PAUSE_SEC, _LONGEST_PAUSE_SEC, _LONGEST_RETRY_SEC = 0.25, 10.0, 60.0
_IDENTITY_SEC = 30.0
_TELL_EVERY_SEC = 30.0
# A shard takes the teacher seconds: from here on it is told that one is in work.
_SLOW_SEC = 30.0
_CLOSE_SEC = 1.0
_POLL_SEC = 0.1
_LOG = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """What a link has done since it was made, the documents of the gate included.

    shards, documents, tokens: scored, the tokens with their prompts. requests: answered ones; request_sec: the time
    that they took. away_sec: while the teacher was away or busy.
    """

    shards: int = 0
    documents: int = 0
    tokens: int = 0
    requests: int = 0
    request_sec: float = 0.0
    away_sec: float = 0.0


class TeacherLink:
    """The teacher of a run. Made and used by one thread; a failure is raised by every later call.

    render: of the dataset whose prompts open the rollouts. seq_len: the longest document that it will be given.
    A teacher that is away or busy is no failure: it is asked again until `close`, and `trouble` tells so.
    """

    def __init__(self, config: TeacherServerConfig, render: RenderConfig, *, seq_len: int) -> None:
        self._config, self._render, self._seq_len = config, render, seq_len
        token = os.environ.get(config.token_env) or None
        self._client = ScoringClient(config.url, token, timeout_sec=config.request_sec)
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._shards: deque[tuple[int, Future[Any]]] = deque()
        self._closed = threading.Event()
        self._trouble = _Trouble(self._client.url)
        self._figures = LinkFigures()
        self._identity: dict[str, Any] | None = None
        self._served: dict[str, Any] = {}
        self._is_asked = False
        self._part_documents = 0
        self._working: tuple[str, float] | None = None
        # A daemon: a request that hangs must not keep a process alive that was told to end.
        self._thread = threading.Thread(target=self._work, name="teacher link", daemon=True)
        self._thread.start()

    def open(self, poll: Callable[[], None] | None = None) -> dict[str, Any]:
        """Wait for the teacher, and see that it is the one of the config: what identifies it (STABLE_KEYS).

        poll: called ten times a second while it waits; what it raises ends the wait. Raises ConfigError naming all
        that is wrong with who answers.
        """
        identity: dict[str, Any] = self._wait(self._call(self._open), poll)
        return identity

    @property
    def served(self) -> dict[str, Any]:
        """How the teacher is served (SERVED_KEYS): model, engine, versions, canary figures. Known once open."""
        return self._served

    def gate(
        self, documents: list[ScoreDocument], poll: Callable[[], None] | None = None
    ) -> AlignmentReport:
        """Score `documents` (`gate_documents`) and see that the targets fit their tokens. Raises AlignmentError."""
        targets = self._wait(self._call(partial(self._score, "document", documents)), poll)
        tokens = [document.tokens_T for document in documents]
        report = alignment_report(zip(tokens, targets, strict=True))
        require_aligned(report)
        return report

    def submit(
        self,
        shard: int,
        documents: list[ScoreDocument],
        then: Callable[[list[SparseTarget]], Any] | None = None,
    ) -> None:
        """Hand over the rollouts of a shard. Shards are scored in the order they come. Raises FormatError.

        then: called with the targets as soon as they are there, in the thread of the link, which it must not keep long;
        `take` gives what it returns.
        """
        for number, document in enumerate(documents):
            try:
                document.positions()
            except FormatError as error:
                raise FormatError(f"shard {shard}, rollout {number}: {error}") from None
        work = partial(self._score_shard, shard, documents, then)
        self._shards.append((shard, self._call(work)))

    def take(self) -> tuple[int, Any] | None:
        """The oldest shard handed over, with list[SparseTarget], one a document in its order, or what `then` made of
        them; None while it is not scored.

        Raises AlignmentError when another teacher answers, ConfigError (refused, as for another token), EngineError
        naming a rollout that the teacher cannot score.
        """
        if not self._shards or not self._shards[0][1].done():
            return None
        shard, scored = self._shards[0]
        targets = scored.result()
        self._shards.popleft()
        return shard, targets

    def trouble(self) -> str | None:
        """Why nothing comes and for how long, in one line; None when all is well."""
        line, working = self._trouble.line(), self._working
        if line is None and working is not None:
            name, since = working
            if (seconds := time.monotonic() - since) > _SLOW_SEC:
                return f"teacher {self._client.url} has been at {name} for {seconds:.0f} s"
        return line

    def figures(self) -> LinkFigures:
        """What it has done until now."""
        return replace(self._figures, away_sec=self._trouble.away_sec())

    def close(self) -> None:
        """End the thread; what is under way is given up. Never waits long, not even for a request that hangs."""
        self._closed.set()
        self._jobs.put(None)
        self._client.close()
        self._thread.join(_CLOSE_SEC)

    def _call(self, work: Callable[[], _Answer]) -> Future[_Answer]:
        future: Future[_Answer] = Future()
        self._jobs.put((work, future))
        return future

    def _wait(self, future: Future[_Answer], poll: Callable[[], None] | None) -> _Answer:
        while not wait([future], _POLL_SEC).done:
            if poll is not None:
                poll()
        return future.result()

    # From here on: the thread.

    def _work(self) -> None:
        failure: BaseException | None = None
        while (job := self._jobs.get()) is not None:
            work, future = job
            try:
                if failure is not None:
                    raise failure
                future.set_result(work())
            except BaseException as error:  # whatever it is, the training thread must hear it
                failure = error
                future.set_exception(error)

    def _open(self) -> dict[str, Any]:
        self._insist(self._ask_identity)
        assert self._identity is not None
        return self._identity

    def _ask_identity(self) -> None:
        """See who answers now: the first time that it may teach, later that it is still the same."""
        whole = self._client.ask_identity(min(_IDENTITY_SEC, self._config.request_sec))
        if self._identity is None:
            require_teacher(self._config, whole)
            self._client.require_room(longest_shown(self._render, whole["system"], self._seq_len))
        else:
            require_same(self._client.url, whole, self._identity)
        self._identity = {key: whole[key] for key in STABLE_KEYS}
        served = {key: whole.get(key) for key in SERVED_KEYS}
        for key in ("engine", "vpmoe"):
            if self._served and self._served[key] != served[key]:
                now, was = shown(served[key]), shown(self._served[key])
                _LOG.warning("teacher %s: %s is %s, it was %s", self._client.url, key, now, was)
        self._served, self._is_asked = served, True

    def _score_shard(
        self,
        shard: int,
        documents: list[ScoreDocument],
        then: Callable[[list[SparseTarget]], Any] | None,
    ) -> Any:
        targets = self._score(f"shard {shard}, rollout", documents)
        self._figures = replace(self._figures, shards=self._figures.shards + 1)
        return targets if then is None else then(targets)

    def _score(self, name: str, documents: list[ScoreDocument]) -> list[SparseTarget]:
        """Targets of all documents. Those of a request that fails by one of them are asked for one by one.

        name: of a document, before its number.
        """
        assert self._identity is not None, "open it first"
        targets: list[SparseTarget] = []
        alone_until, self._is_asked = 0, False
        while (done := len(targets)) < len(documents):
            rest = documents[done : done + 1 if done < alone_until else None]
            self._working = (f"{name} {done} of {len(documents)}", time.monotonic())
            try:
                targets += self._insist(partial(self._ask_part, rest))
            except (DocumentRefused, DocumentFailed) as error:
                if self._part_documents == 1:
                    raise EngineError(
                        f"{name} {done}: the teacher cannot score it", got=str(error)
                    ) from None
                alone_until = done + self._part_documents
                _LOG.warning("%s %d to %d one by one: %s", name, done, alone_until - 1, error)
            finally:
                self._working = None
        return targets

    def _ask_part(self, documents: list[ScoreDocument]) -> list[SparseTarget]:
        """Targets of the first of `documents`, as many as a request may hold."""
        if not self._is_asked:
            self._ask_identity()
        part = self._client.first_part(documents)
        self._part_documents, began = len(part), time.monotonic()
        targets = self._client.score_part(part, self._render, self._config.request_sec)
        figures = self._figures
        self._figures = replace(
            figures,
            documents=figures.documents + len(part),
            tokens=figures.tokens + sum(len(document.tokens_T) for document in part),
            requests=figures.requests + 1,
            request_sec=figures.request_sec + time.monotonic() - began,
        )
        return targets

    def _insist(self, ask: Callable[[], _Answer]) -> _Answer:
        """What `ask` returns, asked again for ever while there is NoAnswer; who answers is asked again first."""
        pause = _FIRST_PAUSE_SEC
        while True:
            began = time.monotonic()
            try:
                answer = ask()
            except NoAnswer as error:
                self._is_asked = False
                if self._closed.is_set():
                    raise
                self._trouble.begin(error, began)
                retry_sec = min(error.retry_sec, _LONGEST_RETRY_SEC)
                self._closed.wait(max(retry_sec, pause * random.uniform(0.5, 1.0)))
                pause = min(2 * pause, _LONGEST_PAUSE_SEC)
            else:
                self._trouble.end()
                return answer


class _Trouble:
    """Why no answer comes. Changed by the thread of a link alone, read by any: each value is replaced whole."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._now: tuple[NoAnswer, float] | None = None
        self._told_at = -math.inf
        self._is_told = False
        self._past_sec = 0.0

    def begin(self, error: NoAnswer, since: float) -> None:
        """`since`: when the question was asked; kept from the first time. Logs it now and then, a short queue never."""
        self._now = (error, self._now[1] if self._now else since)
        now = time.monotonic()
        first_at = self._now[1] + (_TELL_EVERY_SEC if error.state == "is busy" else 0.0)
        if now >= max(first_at, self._told_at + _TELL_EVERY_SEC):
            self._told_at, self._is_told = now, True
            _LOG.warning("%s; waiting", self.line())

    def end(self) -> None:
        if self._now is None:
            return
        seconds = time.monotonic() - self._now[1]
        self._now, self._past_sec = None, self._past_sec + seconds
        if self._is_told:
            _LOG.info("teacher %s answers again, after %.0f s", self._url, seconds)
        self._told_at, self._is_told = -math.inf, False

    def line(self) -> str | None:
        if (now := self._now) is None:
            return None
        error, since = now
        seconds = time.monotonic() - since
        return f"teacher {self._url} {error.state} for {seconds:.0f} s ({error.cause})"

    def away_sec(self) -> float:
        now = self._now
        return self._past_sec + (time.monotonic() - now[1] if now else 0.0)


def gate_documents(dataset: Dataset, count: int) -> list[ScoreDocument]:
    """`count` documents of the train split for the alignment gate, one a row, the rows evenly over the split."""
    rows = dataset.num_rows("train")
    documents = []
    for index in np.unique(np.arange(count) * rows // count).tolist():
        row = dataset.row("train", index)
        first = row.documents()[0]
        documents.append(ScoreDocument(tokens_T=row.tokens_T[first], spans_T=row.spans_T[first]))
    return documents
