"""One engine, one thread, continuous batching: documents of many requests through it in turn.

The engine holds enough to fill its next step, `batch_tokens`; the other documents wait here, each request in a line of
its own, and the requests take turns by tokens (deficit round robin, Shreedhar & Varghese 1995). So a short request
waits for about one step and one turn of the others, never for a long request to end, and no request starves.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from common.errors import EngineError
from datastore.prompt import ScoreRequest

State = Literal["starting", "ready", "draining", "stopped", "failed"]
# A turn gives a request 1/8 of a batch: eight requests share a batch, more take turns over several.
_TURNS_IN_BATCH = 8
# The measured rate forgets: after this much work, what came before counts half.
_RATE_MEMORY_SEC = 10.0
_LONGEST_RETRY_SEC = 60
_LOG = logging.getLogger(__name__)


class Engine(Protocol):
    """What the thread drives. `step` gives the packed rows of finished documents, or why one of them failed."""

    def add(self, request_id: str, request: ScoreRequest) -> None: ...
    def step(self) -> list[tuple[str, np.ndarray | EngineError]]: ...
    def abort(self, request_id: str) -> None: ...
    def close(self) -> None: ...


class Overloaded(Exception):
    """The queue is full; it may have room in `retry_sec`."""

    def __init__(self, held: int, asked: int, limit: int, retry_sec: int) -> None:
        self.retry_sec = retry_sec
        super().__init__(
            f"the queue is full; got {asked:,} tokens beside {held:,} in flight, "
            f"expected at most {limit:,} together; ask again in {retry_sec} s."
        )


class Unavailable(Exception):
    """The engine takes no work: it starts, drains, has stopped or has failed."""


@dataclass(eq=False)
class Ticket:
    """The documents of one request.

    future: their packed rows by place, without the documents that score nothing; or Unavailable, or EngineError.
    credit: tokens that it may give the engine in its turn.
    """

    number: int
    requests: list[ScoreRequest]
    tokens: int
    credit: int = 0
    future: Future[dict[int, np.ndarray]] = field(default_factory=Future)
    waiting: deque[int] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)
    packed: dict[int, np.ndarray] = field(default_factory=dict)

    def request_id(self, index: int) -> str:
        return f"{self.number}.{index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueFigures:
    """What the queue holds now, and what it has done. busy_sec: time inside the engine."""

    state: State
    tokens_in_flight: int
    documents_waiting: int
    documents_running: int
    documents_done: int
    tokens_done: int
    tokens_per_sec: float
    steps: int
    busy_sec: float


class ScoringQueue:
    """Thread-safe. `start` makes the engine and its identity, on the thread that will drive it."""

    def __init__(
        self,
        start: Callable[[], tuple[Engine, dict[str, Any]]],
        *,
        queue_tokens: int,
        batch_tokens: int,
    ) -> None:
        self._start, self._batch_tokens = start, batch_tokens
        self.queue_tokens = queue_tokens
        self.state: State = "starting"
        self.identity: dict[str, Any] | None = None
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # only the thread settles it
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._tickets: set[Ticket] = set()
        self._turns: deque[Ticket] = deque()
        self._running: dict[str, tuple[Ticket, int]] = {}
        self._aborts: list[str] = []
        self._done = _Done()
        self._cause: EngineError | None = None
        # A daemon: an engine that hangs must not keep a process alive that was told to end.
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: list[ScoreRequest]) -> Ticket:
        """Queue the documents of one request. Raises Unavailable, or Overloaded when there is no room for them."""
        tokens = sum(len(request.prompt_T) for request in requests)
        ticket = Ticket(number=next(self._numbers), requests=requests, tokens=tokens)
        ticket.future.set_running_or_notify_cancel()  # from here on only this class settles it
        with self._changed:
            self.require_open()
            if (held := self._tokens()) and held + ticket.tokens > self.queue_tokens:
                raise Overloaded(held, ticket.tokens, self.queue_tokens, self._retry_sec(held))
            ticket.waiting.extend(i for i, r in enumerate(requests) if len(r.positions_P))
            self._tickets.add(ticket)
            if ticket.waiting:
                self._turns.append(ticket)
            self._settle(ticket)
            self._changed.notify_all()
        return ticket

    def require_open(self) -> None:
        """Raises Unavailable unless the engine takes work."""
        if self.state == "failed":
            raise Unavailable(f"the engine has failed: {self._cause}")
        if self.state != "ready":
            raise Unavailable(f"the engine is {self.state}")

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request: what waits is dropped, what runs is aborted before the next step."""
        with self._changed:
            self._drop(ticket)
            self._changed.notify_all()

    def drain(self) -> None:
        """Take no more requests; those in flight go on."""
        with self._changed:
            if self.state in ("starting", "ready"):
                self.state = "draining"

    def wait_idle(self, timeout_sec: float) -> bool:
        """Wait until nothing is in flight; False when time is over first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._tickets, timeout_sec)

    def stop(self, timeout_sec: float) -> bool:
        """End the thread and close the engine; what is in flight fails. False when the thread still runs then."""
        with self._changed:
            if self.state != "failed":
                self.state = "stopped"
            self._refuse_all(
                Unavailable("the server stopped before the engine came to this request")
            )
            self._changed.notify_all()
        self._thread.join(timeout_sec)
        return not self._thread.is_alive()

    def figures(self) -> QueueFigures:
        with self._changed:
            return QueueFigures(
                state=self.state,
                tokens_in_flight=self._tokens(),
                documents_waiting=sum(len(ticket.waiting) for ticket in self._tickets),
                documents_running=len(self._running),
                documents_done=self._done.documents,
                tokens_done=self._done.tokens,
                tokens_per_sec=self._done.tokens_per_sec(),
                steps=self._done.steps,
                busy_sec=self._done.busy_sec,
            )

    def _drive(self) -> None:
        try:
            engine, identity = self._start()
            self._open(identity)
            self._serve(engine)
            engine.close()
        except BaseException as error:  # the engine is dead: it is not closed, the process ends
            self._fail(error)
        else:
            self.ended.set_result(None)

    def _open(self, identity: dict[str, Any]) -> None:
        with self._changed:
            self.identity = identity
            if self.state == "starting":
                self.state = "ready"

    def _serve(self, engine: Engine) -> None:
        while (work := self._work()) is not None:
            aborted, admitted = work
            for request_id in aborted:
                engine.abort(request_id)
            for request_id, request in admitted:
                engine.add(request_id, request)
            start = time.monotonic()
            finished = engine.step()
            self._finish(finished, time.monotonic() - start)

    def _work(self) -> tuple[list[str], list[tuple[str, ScoreRequest]]] | None:
        """What to abort and what to add before the next step; waits for work. None once stopped."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.state == "stopped" or self._turns or self._running or self._aborts
            )
            if self.state == "stopped":
                return None
            aborted, self._aborts = self._aborts, []
            return aborted, self._admit()

    def _admit(self) -> list[tuple[str, ScoreRequest]]:
        # The oldest document may have all but one of its tokens behind it: it fills no step.
        lengths = [len(t.requests[i].prompt_T) for t, i in self._running.values()]
        held = sum(lengths[1:])
        admitted = []
        while self._turns and held < self._batch_tokens:
            ticket = self._turns[0]
            index = ticket.waiting[0]
            length = len(ticket.requests[index].prompt_T)
            if ticket.credit < length:
                ticket.credit += max(1, self._batch_tokens // _TURNS_IN_BATCH)
                self._turns.rotate(-1)
                continue
            ticket.credit -= length
            ticket.waiting.popleft()
            if not ticket.waiting:
                self._turns.popleft()
            ticket.running.add(index)
            self._running[ticket.request_id(index)] = (ticket, index)
            admitted.append((ticket.request_id(index), ticket.requests[index]))
            held += length if len(self._running) > 1 else 0
        return admitted

    def _finish(self, finished: list[tuple[str, np.ndarray | EngineError]], seconds: float) -> None:
        with self._changed:
            self._done.step(seconds)
            for request_id, packed in finished:
                if request_id not in self._running:  # aborted while the step ran
                    continue
                ticket, index = self._running.pop(request_id)
                ticket.running.discard(index)
                self._done.document(len(ticket.requests[index].prompt_T))
                if isinstance(packed, EngineError):
                    _LOG.error("a document failed: %s", packed)
                    self._drop(ticket)
                    ticket.future.set_exception(packed)
                else:
                    ticket.packed[index] = packed
                    self._settle(ticket)
            self._changed.notify_all()

    def _settle(self, ticket: Ticket) -> None:
        if not ticket.waiting and not ticket.running:
            self._tickets.discard(ticket)
            ticket.future.set_result(ticket.packed)

    def _drop(self, ticket: Ticket) -> None:
        for index in ticket.running:
            del self._running[ticket.request_id(index)]
            self._aborts.append(ticket.request_id(index))
        ticket.running.clear()
        ticket.waiting.clear()
        if ticket in self._turns:
            self._turns.remove(ticket)
        self._tickets.discard(ticket)

    def _fail(self, error: BaseException) -> None:
        cause = (
            error if isinstance(error, EngineError) else EngineError(f"the engine failed: {error}")
        )
        _LOG.error("%s", cause, exc_info=error)
        with self._changed:
            self.state, self._cause = "failed", cause
            self._refuse_all(Unavailable(f"the engine has failed: {cause}"))
            self._changed.notify_all()
        self.ended.set_exception(cause)

    def _refuse_all(self, error: Unavailable) -> None:
        for ticket in list(self._tickets):
            self._drop(ticket)
            ticket.future.set_exception(error)

    def _tokens(self) -> int:
        return sum(ticket.tokens for ticket in self._tickets)

    def _retry_sec(self, held: int) -> int:
        """When half of what is held will be done, at the measured rate."""
        rate = self._done.tokens_per_sec()
        return max(1, min(_LONGEST_RETRY_SEC, math.ceil(held / 2 / rate))) if rate else 1


@dataclass
class _Done:
    """What the engine has done; the rate is over recent work."""

    documents: int = 0
    tokens: int = 0
    steps: int = 0
    busy_sec: float = 0.0
    recent_tokens: float = 0.0
    recent_sec: float = 0.0

    def step(self, seconds: float) -> None:
        self.steps += 1
        self.busy_sec += seconds
        self.recent_sec += seconds
        if self.recent_sec > _RATE_MEMORY_SEC:
            self.recent_sec /= 2
            self.recent_tokens /= 2

    def document(self, tokens: int) -> None:
        self.documents += 1
        self.tokens += tokens
        self.recent_tokens += tokens

    def tokens_per_sec(self) -> float:
        return self.recent_tokens / self.recent_sec if self.recent_sec else 0.0
