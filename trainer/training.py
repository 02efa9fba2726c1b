"""The loop of a run, whatever its steps read: from the first step or the newest checkpoint to the last.

`vpmoe-train kd` and `opd` say where micro-batches come from and what is evaluated; checkpoints and the log are here.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from common.errors import VpmoeError
from trainer.batch import Batch
from trainer.checkpoints import Progress, read_progress, sweep
from trainer.config import RunConfig
from trainer.megatron.checkpoint_write import CheckpointWriter, SaveReport
from trainer.megatron.replicas import require_equal_replicas
from trainer.megatron.start import resume, stored_progress, take_from
from trainer.megatron.step import Clock, StepReport, Trainer
from trainer.megatron.topology import Topology, check_run, distributed
from trainer.megatron.watch import Watch
from trainer.provenance import provenance
from trainer.run import (
    RunLog,
    describe_run,
    eval_line,
    peak_memory_gib,
    run_folder,
    utilisation,
)
from trainer.schedule import learning_rate
from trainer.stops import RunStopped

_Line = Callable[[int, dict[str, float]], str]


@contextlib.contextmanager
def guarded(config: RunConfig) -> Iterator[tuple[Topology, Watch]]:
    """The process groups of a run, the watch over its ranks, and the lock of its folder. Every rank enters it."""
    check_run(config)
    with (
        distributed(
            config.device, config.parallel, config.seed, deterministic=config.deterministic
        ) as topology,
        Watch(config.watch, topology, partial(newest_step, config)) as watch,
        run_folder(Path(config.run), topology.rank),
    ):
        yield topology, watch


class Feed(Protocol):
    """The micro-batches of a run on this rank, step after step."""

    def ready(self, watch: Watch) -> None:
        """Wait until the next step's micro-batches can be had. Raises RunStopped on every rank where they cannot."""

    def next(self) -> list[Batch]:
        """The micro-batches of the next step, on the device."""

    def finished(self) -> None:
        """The step of the micro-batches that `next` gave is done."""

    def state(self) -> dict[str, Any]:
        """The place after the last finished step, for a checkpoint: plain JSON values."""

    def positions(self) -> int:
        """Positions of the step that `next` gave, padding included, over all ranks."""

    def values(self) -> dict[str, float]:
        """More of the step that `next` gave for the log; other ranks than 0 may hold fewer."""

    def close(self) -> None:
        """The run is over."""


class TrainingRun(ABC):
    """One run on this rank: student, folder, checkpoints and the loop."""

    def __init__(
        self, config: RunConfig, topology: Topology, seq_len: int, data: dict[str, Any]
    ) -> None:
        """data: what identifies the run's data, for its provenance."""
        self.config, self.topology, self.seq_len = config, topology, seq_len
        self.folder = Path(config.run)
        self.checkpoints = self.folder / "checkpoints"
        self.provenance = provenance(config, data)
        self.load_sec: float | None = None
        self.trainer = Trainer(config, topology, seq_len)
        self.writer = CheckpointWriter(
            self.checkpoints,
            self.trainer,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
        )

    @property
    @abstractmethod
    def eval_every(self) -> int:
        """Steps between evaluations; 0: only after the last."""

    @abstractmethod
    def feed(self, stored: dict[str, Any] | None, log: RunLog) -> Feed:
        """The feed at its start, or at the place of a checkpoint."""

    @abstractmethod
    def evaluate(self, feed: Feed, watch: Watch) -> dict[str, float]:
        """Measures of an evaluation, `eval/...`; other ranks than 0 may hold fewer."""

    @abstractmethod
    def step_line(self, step: int, values: dict[str, float]) -> str:
        """A step as people read it."""

    def eval_line(self, step: int, values: dict[str, float]) -> str:
        """An evaluation as people read it."""
        return eval_line(step, values)

    def finish(self, feed: Feed, watch: Watch) -> None:  # noqa: B027 (nothing, unless a kind of run has something)
        """What is left to do after the last step."""

    def train(self, watch: Watch) -> None:
        """The loop. A step ends by its report or by a RunStopped, which every rank raises and which loses nothing."""
        start, stored = self._start()
        require_equal_replicas(self.trainer.student)
        log = RunLog(self.folder, self.topology.rank, resumed_step=start)
        feed = self.feed(stored, log)
        watch.finished(start)
        try:
            self._steps(start, feed, log, watch)
            self.finish(feed, watch)
        finally:
            feed.close()
            log.close()

    def _steps(self, start: int, feed: Feed, log: RunLog, watch: Watch) -> None:
        config = self.config
        if self.load_sec is not None:
            line = f"loaded in {self.load_sec:.1f} s, going on from step {start} of {config.steps}"
            log.write(start, {"checkpoint/load_sec": self.load_sec}, line)
        if self._evaluation_missing(start, log):
            self._evaluate(start, feed, log, watch, saved=True)
        for step in range(start, config.steps):
            clock = Clock(self.topology.device)
            began = time.perf_counter()
            clock.mark("data")
            rate = learning_rate(config, step)
            watch.phase(f"step {step + 1}")
            try:
                feed.ready(watch)
                report = self.trainer.step(feed.next(), rate, clock)
            except RunStopped as stop:
                watch.phase("saving where it stopped")
                saved = step == start or step % config.checkpoint.every == 0
                raise stop.at(self._kept(stop, step, feed, saved)) from None
            feed.finished()
            done = step + 1
            watch.finished(done)
            if step == start:
                self.writer.reserve()
            _note(self.writer.poll(), log)
            if done % config.log.every == 0 or done == config.steps:
                values = self._values(report, feed, rate, time.perf_counter() - began)
                self._tell(done, values, log, self.step_line)
            if _due(done, self.eval_every, config.steps):
                self._evaluate(done, feed, log, watch)
            if _due(done, config.checkpoint.every, config.steps):
                watch.phase(f"checkpoint of step {done}")
                _note(self._save(done, feed), log)
        watch.phase("the end of the last checkpoint")
        _note(self.writer.finish(), log)

    def _start(self) -> tuple[int, dict[str, Any] | None]:
        """Steps done and the feed's state: from the newest checkpoint when there is one of this very run.

        A run that takes weights from another does so once, before its first step: its own checkpoints say from where.
        """
        stored = stored_progress(self.checkpoints, self.provenance)
        if self.topology.rank == 0:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            sweep(self.checkpoints)
        self.topology.barrier()
        if stored is not None:
            self.provenance["init_from"] = stored.provenance["init_from"]
        elif self.config.init_from is not None:
            self.provenance["init_from"] = take_from(
                self.config.init_from, self.trainer, self.provenance, self.folder
            )
        if self.topology.rank == 0:
            describe_run(self.folder, self.config, self.provenance, self.topology.layout())
        if stored is None:
            return 0, None
        _, self.load_sec = resume(self.checkpoints, self.trainer)
        return stored.step, stored.stream

    def _evaluate(
        self, step: int, feed: Feed, log: RunLog, watch: Watch, *, saved: bool = False
    ) -> None:
        watch.phase(f"evaluation at step {step}")
        try:
            values = self.evaluate(feed, watch)
        except (
            RunStopped
        ) as stop:  # the evaluation is made when the run goes on: see `_evaluation_missing`
            watch.phase("saving where it stopped")
            raise stop.at(self._kept(stop, step, feed, saved)) from None
        self._tell(step, values, log, self.eval_line)

    def _evaluation_missing(self, start: int, log: RunLog) -> bool:
        """Whether the run begins with an evaluation: the first, or one that a stop has cut off."""
        due = (
            bool(self.eval_every) if start == 0 else _due(start, self.eval_every, self.config.steps)
        )
        return due and not self.topology.from_first(log.is_evaluated)

    def _tell(self, step: int, values: dict[str, float], log: RunLog, line: _Line) -> None:
        if self.topology.rank == 0:  # the others need not hold what a line is made of
            log.write(step, values, line(step, values))

    def _save(self, step: int, feed: Feed, *, wait: bool = False) -> SaveReport | None:
        progress = Progress(step=step, stream=feed.state(), provenance=self.provenance)
        return self.writer.save(progress, wait=wait)

    def _kept(self, stop: RunStopped, step: int, feed: Feed, saved: bool) -> str:
        """Save the last finished step unless it is saved or on its way; what became of it, for people."""
        if step == 0:
            return "no step was finished"
        try:
            self.writer.finish()
            if not saved and not stop.worth_keeping:
                return f"step {step} is not saved, being damaged"
            if not saved:
                self._save(step, feed, wait=True)
        except VpmoeError as error:
            return f"step {step} could not be saved ({str(error).rstrip('.')})"
        return f"step {step} is saved"

    def _values(
        self, report: StepReport, feed: Feed, rate: float, seconds: float
    ) -> dict[str, float]:
        phases = {f"seconds/{phase}": value for phase, value in report.seconds.items()}
        tokens_per_sec = feed.positions() / seconds
        return report.values | {
            "lr": rate,
            "seconds/step": seconds,
            **phases,
            "tokens_per_sec": tokens_per_sec,
            **utilisation(
                self.config,
                self.seq_len,
                tokens_per_sec,
                self.topology.device,
                self.topology.world_size,
            ),
            "memory_gib": peak_memory_gib(self.topology.device),
            **feed.values(),
        }


def newest_step(config: RunConfig) -> int | None:
    """The step of the newest complete checkpoint of a run, None without one."""
    progress = read_progress(Path(config.run) / "checkpoints")
    return None if progress is None else progress.step


def _note(saved: SaveReport | None, log: RunLog) -> None:
    if saved is not None:
        log.write(saved.step, saved.values, saved.line())


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
