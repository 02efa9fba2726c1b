"""Writing checkpoints: Megatron plans what each rank writes, threads of this process write it, every rank agrees.

Megatron's own writers (dist_checkpointing/strategies/filesystem_async.py) are processes forked from one that uses CUDA,
with a manager process beside them (line 55) that outlives a kill. The threads here run while steps go on: torch.save
and write(2) release the interpreter, and nothing is left of them when the process dies.

A checkpoint is complete when every rank's files are durable; then rank 0 gives it its name and moves `latest`.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from common.errors import ResumeError
from trainer.checkpoints import Progress, checkpoint_name, commit, unfinished_folder
from trainer.megatron.checkpoint import main_tensors, saved_state
from trainer.megatron.staging import HostStaging
from trainer.megatron.step import Trainer

_FILES_A_RANK = 4  # each written by a thread of its own
_GIB = 2**30


class UnwrittenError(ResumeError):
    """A checkpoint could not be written; the one before is untouched. Every rank raises it."""

    collective = True


@dataclass(kw_only=True)
class _Write:
    """A checkpoint on its way: what to do when its files are there, and this rank's thread that writes them."""

    progress: Progress
    began: float
    total_bytes: int
    blocking_sec: float = 0.0
    finalize: list[Callable[[], None]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    results: queue.Queue = field(default_factory=queue.Queue)
    thread: threading.Thread | None = None
    failure: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """A completed checkpoint. values, as in metrics.jsonl: seconds that steps stood still, seconds in all, bytes."""

    step: int
    values: dict[str, float]

    def line(self) -> str:
        """As people read it."""
        size, seconds = self.values["checkpoint/bytes"], self.values["checkpoint/write_sec"]
        return (
            f"checkpoint {checkpoint_name(self.step)}  {size / _GIB:.2f} GiB in {seconds:.2f} s "
            f"({size / seconds / 1e9:.2f} GB/s), steps stood still for {self.values['checkpoint/blocking_sec']:.2f} s"
        )


class CheckpointWriter:
    """The checkpoints of a run, at most one being written. Every rank calls every method at the same place."""

    def __init__(self, folder: Path, trainer: Trainer, *, keep: int, asynchronous: bool) -> None:
        self.folder, self.trainer, self.topology = folder, trainer, trainer.topology
        self.keep, self.asynchronous = keep, asynchronous
        self._staging = HostStaging(self.topology.device)
        self._write: _Write | None = None

    def reserve(self) -> None:
        """Take the host memory of asynchronous saves now, so that a lack of it stops the run at its first step.

        The optimizer must have made a step: its states exist from then on.
        """
        if self.asynchronous:
            self._staging.reserve([t.nbytes for t in main_tensors(saved_state(self.trainer))])

    def save(self, progress: Progress, *, wait: bool = False) -> SaveReport | None:
        """Write step-N with the state of now, move `latest` to it, drop all but the newest `keep`.

        A write still on its way is waited for first. Asynchronous: returns when the state is copied to host memory, and
        `poll` says when the checkpoint is complete; with `wait`, and always when synchronous, it is on return.
        Returns the report of the one that was completed. Raises UnwrittenError on every rank.
        """
        before = self.finish()
        began = time.perf_counter()
        write = self._write = self._begin(progress, began)
        write.blocking_sec = time.perf_counter() - began
        return self.finish() if wait or not self.asynchronous else before

    def poll(self) -> SaveReport | None:
        """Complete the checkpoint on its way if every rank's files are there; its report, None when there is none.

        Costs one reduction of two numbers while a checkpoint is on its way, nothing otherwise.
        """
        write = self._write
        if write is None:
            return None
        alive = write.thread is not None and write.thread.is_alive()
        running, failed = self._anywhere(alive, not alive and write.failure is not None)
        if failed:
            raise self._given_up()
        return None if running else self._complete()

    def finish(self) -> SaveReport | None:
        """Wait for the checkpoint on its way and complete it; its report, None when there is none."""
        write = self._write
        if write is None:
            return None
        began = time.perf_counter()
        if write.thread is not None:
            write.thread.join()
        _, failed = self._anywhere(False, write.failure is not None)
        if failed:
            raise self._given_up()
        write.blocking_sec += time.perf_counter() - began
        return self._complete()

    def abandon(self) -> None:
        """Stop this rank's writing without a word to the others; what is there is swept at the next start."""
        write, self._write = self._write, None
        if write is not None:
            write.cancelled.set()
            if write.thread is not None:
                write.thread.join()

    def _begin(self, progress: Progress, began: float) -> _Write:
        unfinished = unfinished_folder(self.folder, progress.step)
        state = saved_state(self.trainer)
        write = _Write(
            progress=progress, began=began, total_bytes=self._require_room(progress, state)
        )
        if self.topology.rank == 0:
            unfinished.mkdir(parents=True)
        self.topology.barrier()
        self._write = write
        transforms, buckets = self._planned(write, state, unfinished)
        if self.asynchronous:
            buckets = self._staged(buckets)
        write.thread = threading.Thread(
            target=_write_buckets, args=(write, transforms, buckets), daemon=True
        )
        write.thread.start()
        return write

    def _planned(
        self, write: _Write, state: dict[str, Any], unfinished: Path
    ) -> tuple[list[Any], list[Any]]:
        """What Megatron wants this rank to write: stream transforms, and a bucket of items for each file."""
        # A queue of this process: where Megatron looks for the results, otherwise a manager process's.
        filesystem_async._results_queue = write.results
        try:
            request = dist_checkpointing.save(
                state, str(unfinished), sharded_strategy=_strategy(), async_sharded_save=True
            )
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failed_alone(error) from error
        write.finalize = list(request.finalize_fns)
        if request.async_fn is None:  # this rank holds replicas only
            return [], []
        return request.async_fn.args[0], request.async_fn_args[1]

    def _staged(self, buckets: list[Any]) -> list[Any]:
        """The buckets with every tensor copied to host memory."""
        tensors = [tensor for _, _, (_, pairs) in buckets for _, tensor in pairs]
        self._staging.reserve([tensor.nbytes for tensor in tensors])
        copies = iter(self._staging.copy(tensors))
        return [
            (path, name, (objects, [(item, next(copies)) for item, _ in pairs]))
            for path, name, (objects, pairs) in buckets
        ]

    def _require_room(self, progress: Progress, state: dict[str, Any]) -> int:
        """Bytes of the checkpoint. Raises UnwrittenError on every rank when the disk has fewer free."""
        num_bytes = sum(tensor.nbytes for tensor in main_tensors(state))
        total = torch.tensor([num_bytes], dtype=torch.int64, device=self.topology.device)
        dist.all_reduce(total)
        free = torch.tensor([_free_bytes(self.folder)], dtype=torch.int64, device=total.device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        if int(total) > int(free):
            raise _unwritten(
                self.folder, progress.step, f"it has {int(total) / _GIB:.1f} GiB", int(free)
            )
        return int(total)

    def _anywhere(self, *flags: bool) -> list[bool]:
        """Each flag, true when it is on any rank."""
        values = torch.tensor(flags, dtype=torch.int32, device=self.topology.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def _complete(self) -> SaveReport:
        write = self._write
        assert write is not None
        try:
            for finalize in write.finalize:
                finalize()
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failed_alone(error) from error
        if self.topology.rank == 0:
            try:
                commit(self.folder, write.progress, self.topology.layout(), self.keep)
            except OSError as error:
                write.failure = error
        if self._anywhere(write.failure is not None)[0]:
            raise self._given_up() from write.failure
        self._write = None
        seconds = time.perf_counter() - write.began
        values = {
            "checkpoint/blocking_sec": write.blocking_sec if self.asynchronous else seconds,
            "checkpoint/write_sec": seconds,
            "checkpoint/bytes": float(write.total_bytes),
        }
        return SaveReport(step=write.progress.step, values=values)

    def _given_up(self) -> UnwrittenError:
        """Every rank stops writing; rank 0 removes what is there. The error, the same on every rank."""
        write = self._write
        assert write is not None
        step = write.progress.step
        free = _free_bytes(self.folder)
        mine = None if write.failure is None else _last_line(write.failure)
        self.abandon()
        every: list[tuple[str | None, int]] = [(mine, free)] * self.topology.world_size
        dist.all_gather_object(every, (mine, free))
        if self.topology.rank == 0:
            shutil.rmtree(unfinished_folder(self.folder, step), ignore_errors=True)
        cause = next((said for said, _ in every if said is not None), "unknown")
        return _unwritten(self.folder, step, cause, min(free for _, free in every))

    def _failed_alone(self, error: Exception) -> UnwrittenError:
        """Inside Megatron's collectives, where the others wait: nothing can be agreed on, this rank just stops."""
        write = self._write
        assert write is not None
        self.abandon()
        return _unwritten(
            self.folder, write.progress.step, _last_line(error), _free_bytes(self.folder)
        )


def _strategy() -> TorchDistSaveShardedStrategy:
    return TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=_FILES_A_RANK)


def _write_buckets(write: _Write, transforms: list[Any], buckets: list[Any]) -> None:
    """The thread of one rank: every bucket into its file, the write results to where Megatron looks for them.

    Its threads are daemons: a run that stops for another reason does not wait for 60 GB to be written.
    """
    results: dict[int, list[Any]] = {}

    def write_file(number: int) -> None:
        try:
            results[number] = _written(write.cancelled, transforms, buckets[number])
        except Exception as error:  # whatever it is, the step loop must hear of it
            write.failure = write.failure or error
            write.cancelled.set()  # the other files of this rank need not be finished

    files = [
        threading.Thread(target=write_file, args=(number,), daemon=True)
        for number in range(len(buckets))
    ]
    for file in files:
        file.start()
    for file in files:
        file.join()
    if buckets and write.failure is None:
        write.results.put(results)


def _written(cancelled: threading.Event, transforms: list[Any], bucket: Any) -> list[Any]:
    path, name, (objects, tensors) = bucket
    written = []
    with open(path, "wb") as stream:
        for item, data in [*objects, *tensors]:
            if cancelled.is_set():
                raise InterruptedError("given up")
            content = data.detach().cpu() if isinstance(data, torch.Tensor) else data
            written.append(
                _write_item(
                    *transforms, stream, content, item, name, SerializationFormat.TORCH_SAVE
                )
            )
        stream.flush()
        os.fsync(stream.fileno())
    return written


def _unwritten(folder: Path, step: int, cause: str, free_bytes: int) -> UnwrittenError:
    return UnwrittenError(
        f"checkpoint {checkpoint_name(step)} could not be written to {folder}: {cause}",
        got=f"{free_bytes / _GIB:.1f} GiB free at that moment",
        remedy="make room or lower checkpoint.keep, then run the same command: it goes on from the newest checkpoint",
    )


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
