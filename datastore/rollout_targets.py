"""Targets into a rollout buffer: at once, or by a process beside the one that samples and trains.

Encoding a shard takes seconds of pure Python and numpy (benchmarks/rollouts.py). In the trainer's process it would
hold the interpreter, and with it the launch of every kernel; in its own it costs the trainer the copy of the targets.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, reduction
from pathlib import Path
from typing import Any

from common.errors import ResumeError, VpmoeError
from common.files import full_disk_told
from datastore.rollout_reader import RolloutReader
from datastore.rollout_write import write_scored
from datastore.types import SparseTarget, Split
from datastore.workers import end_with_parent

AGAIN = "free space and run the same command again: finished shards are kept"


def require_open(buffer: RolloutReader) -> None:
    """ResumeError for a sealed buffer."""
    if buffer.is_sealed:
        raise ResumeError(
            f"{buffer.folder} is sealed: nothing can be added", remedy="start another buffer"
        )


def add_targets(buffer: RolloutReader, shard: int, targets: Sequence[SparseTarget]) -> None:
    """What `RolloutBuffer.add_targets` says; the caller holds the buffer's lock."""
    require_open(buffer)
    if not buffer.is_scored(shard):
        write_targets(buffer, "train", shard, targets)


def write_targets(
    buffer: RolloutReader, split: Split, shard: int, targets: Sequence[SparseTarget]
) -> None:
    """Write the targets of a sampled shard of either split, over those that it may have."""
    found = buffer.read_shard(split, shard)
    with full_disk_told(buffer.folder, AGAIN):
        write_scored(
            buffer.place,
            buffer.buffer,
            found.record,
            found.rows,
            found.rollouts,
            targets,
            buffer.first_order(),
        )


class TargetEncoder:
    """One process that writes the targets of train shards, in the order they come, while its maker goes on.

    It writes what `add_targets` writes, byte by byte. It holds the buffer's lock together with its maker and ends with
    it, however that dies: the next writer sweeps nothing that is still being written.
    """

    def __init__(self, folder: Path, lock: int) -> None:
        """lock: descriptor of the buffer's lock file, held."""
        self._folder = folder
        context = multiprocessing.get_context("spawn")
        self._stop_reader, self._stop_writer = context.Pipe(duplex=False)
        arguments = (self._stop_reader, _Inherited(lock))
        self._pool = ProcessPoolExecutor(1, context, _begin, arguments)
        # Started now: its imports take a second, which the first shard need not wait for.
        self._pid = self._pool.submit(os.getpid)

    @property
    def pid(self) -> int:
        """Of the process, waited for."""
        return self._pid.result()

    def add_targets(self, shard: int, targets: Sequence[SparseTarget]) -> Future[None]:
        """`RolloutBuffer.add_targets`, done once they are durable. May be called by any thread.

        The future raises what that raises, and VpmoeError when the process has died.
        """
        # One by one: a pickle of all would hold the interpreter for as long as it takes.
        pickled = [pickle.dumps(target, protocol=5) for target in targets]
        told: Future[None] = Future()
        try:
            done = self._pool.submit(_add_pickled, self._folder, shard, pickled)
        except BrokenProcessPool:
            told.set_exception(_died())
        else:
            done.add_done_callback(functools.partial(_tell, told))
        return told

    def close(self) -> None:
        """Let what the process has in hand, two shards at most, become durable; the others are dropped."""
        self._pool.shutdown(cancel_futures=True)
        self._stop_writer.close()
        self._stop_reader.close()


class _Inherited:
    """A file descriptor that a spawned process is given; the kernel frees a lock on it when the last holder ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inherited._received, (reduction.DupFd(self._descriptor),)

    @staticmethod
    def _received(duplicate: Any) -> _Inherited:
        return _Inherited(duplicate.detach())


def _begin(stop: connection.Connection, lock: _Inherited) -> None:
    """Start of the process, which never closes `lock`."""
    # torchrun tells the whole process group to end; the trainer decides what is finished before it does.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(stop)


def _add_pickled(folder: Path, shard: int, pickled: Sequence[bytes]) -> None:
    add_targets(_reader(folder), shard, [pickle.loads(target) for target in pickled])


@functools.lru_cache(maxsize=1)
def _reader(folder: Path) -> RolloutReader:
    return RolloutReader.open_reader(folder)


def _tell(told: Future[None], done: Future[None]) -> None:
    if done.cancelled():
        told.cancel()
        return
    error = done.exception()
    if isinstance(error, BrokenProcessPool):
        error = _died()
    if error is None:
        told.set_result(None)
    else:
        told.set_exception(error)


def _died() -> VpmoeError:
    return VpmoeError(
        "the process that stores targets died (killed, or out of memory)",
        remedy="run the same command again: finished shards are kept",
    )
