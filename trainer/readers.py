"""Reading micro-batches: from an open dataset in this process, or by processes beside the one that trains.

While a thread of the trainer's process reads, the trainer calls its operators a third to a quarter as fast, and two
such threads read no more than one (benchmarks/feed.py): the interpreter has one lock. A process of its own costs the
trainer one copy of the finished micro-batch, made without that lock. `python -m trainer.readers PIPE MEMORY` is such a
process; it is given open file descriptors, leaves no name in the file system and ends when its pipe does, however the
trainer ends.
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from common.errors import EngineError, FormatError
from datastore.reader import Dataset, TargetStore
from datastore.types import DocTarget, PackedRow, Split
from trainer.batch import Batch, make_batch

Rows = Sequence[int] | np.ndarray
Flags = Sequence[bool] | np.ndarray
# Rows of a micro-batch, and which of them use their targets.
Job = tuple[Rows, Flags]
# Name, dtype (numpy's), shape and first byte of each tensor.
_Layout = list[tuple[str, str, tuple[int, ...], int]]
_HEAD_BYTES = _ALIGN = 64  # in front: the number of the row being read, int64
_START_SEC, _END_SEC = 120.0, 5.0
# The arrays of a micro-batch are megabytes each, and glibc would ask the kernel for them, and give them back, each
# time: decoding then takes half as long again, collating twice as long and more (benchmarks/feed.py, `stages_plain`).
# 32 MiB is the most that it takes.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824",
}
_LOG = logging.getLogger(__name__)


class RowReader:
    """Micro-batches of an open dataset and its targets."""

    def __init__(self, dataset: Dataset, targets: TargetStore | None) -> None:
        self.dataset, self.targets = dataset, targets

    def batch(
        self,
        split: Split,
        rows: Rows,
        with_targets: Flags,
        begin: Callable[[int], None] = lambda index: None,
        *,
        size: int = 1,
    ) -> Batch:
        """The batch of these rows; one whose flag is off trains without targets, as do its documents without any.

        begin: told the index of each row before it is read. size: rows in which nothing is a target follow until there
        are so many. Raises FormatError when a row whose flag is on has no targets.
        """
        packed, documents = [], []
        for index, wanted in zip(rows, with_targets, strict=True):
            begin(int(index))
            row = self.dataset.row(split, int(index))
            packed.append(row)
            documents.append(self.documents(split, int(index), row) if wanted else None)
        if missing := max(0, size - len(packed)):
            first = self.dataset.row(split, 0)
            empty = dataclasses.replace(first, spans_T=np.zeros_like(first.spans_T))
            packed, documents = packed + [empty] * missing, documents + [None] * missing
        return make_batch(packed, documents)

    def documents(self, split: Split, index: int, row: PackedRow) -> list[DocTarget | None]:
        """The targets of a row that was scored when the run began. Raises FormatError where it has none."""
        documents = None if self.targets is None else self.targets.documents(split, index, row)
        if documents is None:
            raise FormatError(
                f"{split} row {index} has no targets",
                expected="targets, as when the run was started",
                remedy="the target files changed under the run: `vpmoe-data verify`, then start again",
            )
        return documents


class ReaderProcesses:
    """Processes that read train rows for one thread of this process; each has a piece of shared memory for its answer.

    The dataset and its targets are opened again there, so neither may be replaced meanwhile (FormatError).
    """

    def __init__(self, dataset: Dataset, targets: TargetStore | None, *, count: int) -> None:
        """count: at least 1. Waits until all have opened the files. Raises what one of them raises, or EngineError."""
        self._processes = [_Process() for _ in range(count)]
        self._waiting = self._processes[0]
        try:
            for process in self._processes:
                process.send((dataset, targets))
            for process in self._processes:
                process.answer(_START_SEC)
        except BaseException:
            self.close()
            raise

    def row(self) -> int:
        """The row that the process whose answer is awaited is reading, or read last."""
        return self._waiting.row()

    def read(self, jobs: Sequence[Job], *, pin: bool) -> list[Batch]:
        """The micro-batches of these jobs in order, in page-locked memory with `pin`.

        Raises what a process raised, the first in order, or EngineError when one died. No call follows an error.
        """
        count, batches = len(self._processes), []
        for number in range(min(count, len(jobs))):
            self._processes[number].send(jobs[number])
        for number in range(len(jobs)):
            self._waiting = process = self._processes[number % count]
            size, layout = process.answer()
            batches.append(_taken(process.content(size), layout, pin=pin))
            if number + count < len(jobs):
                process.send(jobs[number + count])
        return batches

    def pids(self) -> list[int]:
        """Of the processes, for measurements."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End the processes, whatever they do; a thread that awaits an answer gets EngineError."""
        for process in self._processes:
            process.end()


class _Process:
    """One process with its pipe and its memory, seen from the trainer."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        self._memory = os.memfd_create("micro-batch")
        os.ftruncate(self._memory, _HEAD_BYTES)
        self._map = mmap.mmap(self._memory, _HEAD_BYTES)
        self._row = np.frombuffer(self._map, np.int64, 1)
        numbers = [theirs.fileno(), self._memory]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.readers", *map(str, numbers)],
            pass_fds=numbers,
            env=os.environ | {"PYTHONPATH": paths} | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
        )
        self.pid = self._process.pid
        theirs.close()

    def row(self) -> int:
        return int(self._row[0])

    def send(self, what: Any) -> None:
        try:
            self._pipe.send(what)
        except OSError:
            raise self._died() from None

    def answer(self, wait_sec: float | None = None) -> Any:
        """What it made of what was sent. Raises its error, or EngineError."""
        try:
            if wait_sec is not None and not self._pipe.poll(wait_sec):
                raise EngineError(
                    "a reader process does not start",
                    got=f"nothing after {wait_sec:g} s",
                    remedy="look whether the storage of the dataset answers, then start again",
                )
            value, error = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if error is not None:
            raise error
        return value

    def content(self, size: int) -> torch.Tensor:
        """The first `size` bytes of its memory behind the head: uint8, a view."""
        if len(self._map) < _HEAD_BYTES + size:
            self._map = mmap.mmap(self._memory, 0)
            self._row = np.frombuffer(self._map, np.int64, 1)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=_HEAD_BYTES)

    def end(self) -> None:
        # Not by closing the pipe: a thread may be reading from it, and then the kernel tells it nothing.
        self._process.kill()
        if self._code() is None:
            _LOG.warning("a reader process is held by its storage; it ends when that answers")

    def _died(self) -> EngineError:
        return EngineError(
            "a reader process died",
            got=f"exit code {self._code()}",
            remedy="it may have been killed for memory: free some, and run the same command to go on",
        )

    def _code(self) -> int | None:
        """Its exit code, once it has ended; its pipe may have ended a moment earlier."""
        try:
            return self._process.wait(_END_SEC)
        except subprocess.TimeoutExpired:
            return None


def _taken(content_N: torch.Tensor, layout: _Layout, *, pin: bool) -> Batch:
    """A batch of its own from shared memory: one block, copied at once, that all its tensors are views of."""
    block_N = torch.empty(len(content_N), dtype=torch.uint8, pin_memory=pin).copy_(content_N)
    tensors = {}
    for name, dtype, shape, first in layout:
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        tensors[name] = block_N[first : first + size].view(kind).view(shape)
    return Batch(**tensors)


def _layout(batch: Batch) -> tuple[int, _Layout]:
    """Bytes that the tensors of a batch take, each from a multiple of _ALIGN, and where they lie."""
    size, layout = 0, []
    for field in dataclasses.fields(batch):
        array = getattr(batch, field.name).numpy()
        layout.append((field.name, array.dtype.str, array.shape, size))
        size += -(-array.nbytes // _ALIGN) * _ALIGN
    return max(size, _ALIGN), layout


def _serve(pipe: Connection, memory: int) -> None:
    """Answer jobs until the pipe ends."""
    content = mmap.mmap(memory, 0)

    def begin(row: int) -> None:
        np.frombuffer(content, np.int64, 1)[0] = row

    reader = RowReader(*pipe.recv())
    pipe.send((None, None))
    while True:
        rows, uses = pipe.recv()
        batch = reader.batch("train", rows, uses, begin)
        size, layout = _layout(batch)
        if len(content) < _HEAD_BYTES + size:
            os.ftruncate(memory, _HEAD_BYTES + size + size // 4)
            content = mmap.mmap(memory, 0)
        bytes_N = np.frombuffer(content, np.uint8, size, _HEAD_BYTES)
        for name, _, _, first in layout:
            source_N = getattr(batch, name).numpy().reshape(-1).view(np.uint8)
            bytes_N[first : first + len(source_N)] = source_N
        pipe.send(((size, layout), None))


def main() -> None:
    """The process: descriptors of its pipe and of its memory on the command line."""
    # Both may reach the whole process group; the trainer decides, saves, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    pipe = Connection(int(sys.argv[1]))
    try:
        _serve(pipe, int(sys.argv[2]))
    except EOFError:
        return
    except Exception as error:
        pipe.send((None, error))


if __name__ == "__main__":
    main()
