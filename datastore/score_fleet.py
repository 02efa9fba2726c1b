"""Engines at work on the shards of a run: who gets the next shard, and what happens when an engine fails.

Where engines run is a `Room`: processes of this machine (here), or Ray actors (datastore/cluster.py). A room starts
engines and passes jobs; everything else is the same.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from common import logs
from common.errors import ConfigError, EngineError, VpmoeError
from datastore.score_job import QuarantineError, ScoreRun, ShardJob, ShardRecord
from datastore.score_pieces import finished_parts, scored_tokens
from datastore.score_worker import ShardWorker, StartEngine
from datastore.teacher import TeacherConfig
from datastore.workers import end_with_parent

# Failures of an engine in a row without one more piece or part on disk, before it is given up. A single poison document
# causes four at most, as what failed is tried after everything else.
MAX_FAILURES = 8
# An engine that hangs leaves nothing on disk: a piece takes a minute, the start of the locked teacher a few.
STALL_SEC = 3600.0
_POLL_SEC = 2.0
# vLLM takes seconds to stop its workers in order.
_CLOSE_SEC = 30.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """An engine has started and passed its canary."""

    report: dict[str, Any]


@dataclass(frozen=True)
class Done:
    """An engine took the shard that it was given, and may have finished shards."""

    records: list[ShardRecord]


@dataclass(frozen=True)
class Failed:
    """An engine is gone. is_final: no other try would help."""

    error: VpmoeError
    is_final: bool


Event = Ready | Done | Failed


class Host:
    """A worker behind messages: what a process or an actor answers. After `Failed` it must be ended."""

    def __init__(self, run: ScoreRun, start: StartEngine) -> None:
        self._run, self._start = run, start
        self._worker: ShardWorker | None = None

    def begin(self) -> Event:
        """Start the engine."""
        return _answer(self._begin)

    def work(self, job: ShardJob | None) -> Event:
        """Score a shard; None: finish those under way."""
        return _answer(lambda: self._work(job))

    def close(self) -> None:
        """Stop the engine, if it has started."""
        if self._worker is not None:
            self._worker.close()

    def _begin(self) -> Event:
        self._worker = ShardWorker(self._run, self._start)
        return Ready(self._worker.report)

    def _work(self, job: ShardJob | None) -> Event:
        assert self._worker is not None, "a job comes after Ready"
        return Done(self._worker.score(job) if job else self._worker.finish())


def _answer(action: Callable[[], Event]) -> Event:
    try:
        return action()
    except QuarantineError as error:
        return Failed(error, is_final=True)
    except EngineError as error:
        return Failed(error, is_final=False)
    except VpmoeError as error:
        return Failed(error, is_final=True)
    except Exception as error:
        _LOG.exception("a worker failed")
        return Failed(
            VpmoeError(f"a worker failed: {type(error).__name__}: {error}"), is_final=True
        )


class Room(Protocol):
    """Where engines run, by number."""

    def start(self, number: int) -> None:
        """Start an engine, in the place of a dead one of that number; its first event is Ready or Failed."""

    def submit(self, number: int, job: ShardJob | None) -> None:
        """Give a shard (or None: finish) to an engine that is free; its next event is Done or Failed."""

    def wait(self, timeout: float) -> tuple[int, Event] | None:
        """The next event; None after `timeout` seconds without one. An engine that failed is gone by then."""

    def kill(self, number: int) -> None:
        """End an engine at once; it has no more events."""

    def close(self, *, at_once: bool) -> None:
        """End all engines, letting them stop in order or not."""


@dataclass
class _Engine:
    """held: given to it and not returned. failures: in a row while the `parts` of those on disk stayed as they were.

    seen: the parts on disk when it was looked at, since: when they last changed or it had an event.
    """

    held: list[ShardJob] = field(default_factory=list)
    is_busy: bool = True
    was_ready: bool = False
    failures: int = 0
    parts: int = -1
    seen: int = 0
    since: float = field(default_factory=time.monotonic)


class Fleet:
    """A number of engines in a room, and the shards they have to score."""

    def __init__(
        self,
        room: Room,
        engines: int,
        jobs: Iterable[ShardJob],
        join: Callable[[dict[str, Any]], None],
    ) -> None:
        """join: called with the report of each engine that starts; what it raises ends the run."""
        self._room, self._join = room, join
        self._waiting = collections.deque(jobs)
        self._engines = {number: _Engine() for number in range(min(engines, len(self._waiting)))}

    def run(self, bar: logs.Progress, done: int) -> Iterator[ShardRecord]:
        """The records of all shards as they finish. done: tokens that `bar` shows already.

        Raises the error of a worker that another try would not repair, EngineError when no engine is left.
        """
        _LOG.info("starting %d engines for %d shards", len(self._engines), len(self._waiting))
        for number in self._engines:
            self._room.start(number)
        shown = done
        while self._waiting or any(engine.held for engine in self._engines.values()):
            if (found := self._room.wait(_POLL_SEC)) is not None:
                for record in self._handle(*found):
                    done += record.row_tokens
                    yield record
            self._end_stalled()
            held = [job for engine in self._engines.values() for job in engine.held]
            now = done + sum(scored_tokens(job) for job in held)
            if now > shown:
                bar.advance(now - shown)
                shown = now

    def _handle(self, number: int, event: Event) -> list[ShardRecord]:
        engine = self._engines[number]
        engine.since = time.monotonic()
        if isinstance(event, Failed):
            self._failed(number, event)
            return []
        engine.is_busy = False
        records = event.records if isinstance(event, Done) else []
        if isinstance(event, Ready):
            self._join(event.report)
            engine.was_ready = True
            _LOG.info("engine %d is ready (%s)", number, event.report["engine"]["device"])
        engine.failures, engine.parts = 0, -1
        names = {record.name for record in records}
        engine.held = [job for job in engine.held if job.name not in names]
        self._give_out()
        return records

    def _give_out(self) -> None:
        """A shard to each free engine; one that holds shards and gets no more is to finish them."""
        for number, engine in self._engines.items():
            if engine.is_busy or not (self._waiting or engine.held):
                continue
            job = self._waiting.popleft() if self._waiting else None
            engine.is_busy = True
            if job:
                engine.held.append(job)
            self._room.submit(number, job)

    def _end_stalled(self) -> None:
        for number, engine in list(self._engines.items()):
            parts = sum(finished_parts(job) for job in engine.held)
            if parts != engine.seen or not engine.is_busy:
                engine.seen, engine.since = parts, time.monotonic()
            elif time.monotonic() - engine.since > STALL_SEC:
                self._room.kill(number)
                error = EngineError(f"nothing came from it for {STALL_SEC:.0f} s")
                self._failed(number, Failed(error, is_final=False))

    def _failed(self, number: int, event: Failed) -> None:
        engine = self._engines[number]
        if event.is_final:
            raise event.error
        parts = sum(finished_parts(job) for job in engine.held)
        engine.failures = 1 if parts > engine.parts else engine.failures + 1
        engine.parts = parts
        self._waiting.extendleft(reversed(engine.held))
        engine.held = []
        if engine.was_ready and engine.failures < MAX_FAILURES:
            _LOG.warning("engine %d failed and is started again: %s", number, event.error)
            self._room.start(number)
            engine.is_busy, engine.since = True, time.monotonic()
        else:
            _LOG.warning("engine %d is given up: %s", number, event.error)
            del self._engines[number]
        if not self._engines:
            raise EngineError(
                f"no engine is left; the last one failed with: {event.error}",
                remedy="repair the cause, then run the same command again: what is scored is kept",
            )
        self._give_out()


class LocalRoom:
    """Engines in processes of this machine, started by spawn; they end with this process, however it dies."""

    def __init__(self, run: ScoreRun, engines: int, start: StartEngine) -> None:
        self._arguments = (run, start)
        self._gpus = _gpus_of(run.teacher, engines)
        self._context = multiprocessing.get_context("spawn")
        self._stop_reader, self._stop_writer = self._context.Pipe(duplex=False)
        self._processes: dict[int, Any] = {}
        self._pipes: dict[int, multiprocessing.connection.Connection] = {}

    def start(self, number: int) -> None:
        mine, theirs = self._context.Pipe()
        environment = {"CUDA_VISIBLE_DEVICES": self._gpus[number]} if self._gpus else {}
        process = self._context.Process(
            target=_engine_process,
            args=(theirs, self._stop_reader, environment, *self._arguments),
            name=f"engine-{number}",
        )
        process.start()
        theirs.close()
        self._processes[number], self._pipes[number] = process, mine

    def submit(self, number: int, job: ShardJob | None) -> None:
        with contextlib.suppress(OSError):  # it died just now, which the next `wait` tells
            self._pipes[number].send(job)

    def wait(self, timeout: float) -> tuple[int, Event] | None:
        readable = multiprocessing.connection.wait(list(self._pipes.values()), timeout)
        for number, pipe in self._pipes.items():
            if pipe not in readable and self._processes[number].is_alive():
                continue
            event = self._received(number)
            if isinstance(event, Failed):
                self.kill(number)
            return number, event
        return None

    def close(self, *, at_once: bool) -> None:
        if at_once:
            self._stop_writer.close()
        for pipe in self._pipes.values():
            pipe.close()
        for process in self._processes.values():
            process.join(0 if at_once else _CLOSE_SEC)
            process.kill()
            process.join()
        self._stop_writer.close()
        self._stop_reader.close()

    def _received(self, number: int) -> Event:
        # Workers of a dead engine may hold its end of the pipe open for a moment: so never a blocking read.
        with contextlib.suppress(EOFError, OSError):
            if self._pipes[number].poll():
                return self._pipes[number].recv()
        process = self._processes[number]
        process.join(_CLOSE_SEC)
        what = f"its process died (exit code {process.exitcode}; -9: killed or out of memory)"
        return Failed(EngineError(what), is_final=False)

    def kill(self, number: int) -> None:
        self._pipes.pop(number).close()
        process = self._processes.pop(number)
        process.kill()
        process.join()


def _engine_process(
    pipe: multiprocessing.connection.Connection,
    stop: multiprocessing.connection.Connection,
    environment: dict[str, str],
    run: ScoreRun,
    start: StartEngine,
) -> None:
    end_with_parent(stop)
    os.environ.update(environment)
    logs.setup(rank=1)
    host = Host(run, start)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the fleet needs it no more
        pipe.send(host.begin())
        while True:
            pipe.send(host.work(pipe.recv()))
    host.close()


def local_engines(teacher: TeacherConfig, wanted: int | None) -> int:
    """Engines that this machine takes: one for each visible GPU (or tensor-parallel group), one on a CPU.

    Raises ConfigError when more are wanted, or there is no GPU for one.
    """
    if teacher.engine.device == "cpu":
        return wanted or 1
    size = teacher.engine.tensor_parallel_size
    room = len(_visible_gpus()) // size
    if room < (wanted or 1):
        raise ConfigError(
            f"teacher {teacher.name} takes {size} GPU(s) an engine",
            got=f"{len(_visible_gpus())} visible",
            expected=f"room for {wanted or 1} engine(s)",
            remedy="check CUDA_VISIBLE_DEVICES, or give fewer --engines",
        )
    return wanted or room


def _gpus_of(teacher: TeacherConfig, engines: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each engine; none on a CPU."""
    if teacher.engine.device == "cpu":
        return []
    size, gpus = teacher.engine.tensor_parallel_size, _visible_gpus()
    return [",".join(gpus[size * number : size * (number + 1)]) for number in range(engines)]


def _visible_gpus() -> list[str]:
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    import torch

    return [str(gpu) for gpu in range(torch.cuda.device_count())]
