"""`vpmoe-train kd`: distillation from stored targets, from the first step or from the newest checkpoint."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

from common.errors import VpmoeError
from common.files import write_json
from datastore.stream import RowStream
from trainer.checkpoints import Progress, read_progress, sweep
from trainer.config import KDConfig
from trainer.data import Loader, RunData
from trainer.eval import evaluate
from trainer.megatron.checkpoint_write import CheckpointWriter, SaveReport
from trainer.megatron.replicas import require_equal_replicas
from trainer.megatron.start import resume, stored_progress, take_from
from trainer.megatron.step import Clock, StepReport, Trainer
from trainer.megatron.topology import Topology, check_run, distributed
from trainer.megatron.watch import Watch
from trainer.megatron.weights import load_weights
from trainer.provenance import provenance, require_same_run
from trainer.run import (
    RunLog,
    describe_run,
    eval_line,
    peak_memory_gib,
    run_folder,
    step_line,
    utilisation,
)
from trainer.schedule import learning_rate
from trainer.stops import RunStopped

_LOG = logging.getLogger(__name__)


def run_kd(config: KDConfig) -> None:
    """Train until `steps`; the same command goes on where a killed one was saved. Every rank calls it."""
    check_run(config)
    with (
        distributed(
            config.device, config.parallel, config.seed, deterministic=config.deterministic
        ) as topology,
        Watch(config.watch, topology, partial(_newest_step, config)) as watch,
        run_folder(Path(config.run), topology.rank),
    ):
        KDRun(config, topology).train(watch)


def run_eval(config: KDConfig) -> dict[str, float]:
    """Evaluate the newest checkpoint of a run; rank 0 tells it and writes eval.json. All ranks return the same."""
    check_run(config)
    with distributed(
        config.device, config.parallel, config.seed, deterministic=config.deterministic
    ) as topology:
        run = KDRun(config, topology)
        progress = load_weights(run.checkpoints, run.trainer.student)
        require_same_run(progress.provenance, run.provenance)
        values = evaluate(run.trainer, run.data, config)
        if topology.rank == 0:
            write_json(run.folder / "eval.json", {"step": progress.step} | values)
        _LOG.info("%s", eval_line(progress.step, values))
        return values


class KDRun:
    """One run on this rank: data, student, folder."""

    def __init__(self, config: KDConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.folder = Path(config.run)
        self.checkpoints = self.folder / "checkpoints"
        self.data = RunData.open(config)
        self.provenance = provenance(config, self.data.provenance())
        self.load_sec: float | None = None
        self.seq_len = self.data.dataset.manifest.seq_len
        self.trainer = Trainer(config, topology, self.seq_len)
        self.writer = CheckpointWriter(
            self.checkpoints,
            self.trainer,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
        )

    def train(self, watch: Watch) -> None:
        """The loop. A step ends by its report or by a RunStopped, which every rank raises and which loses nothing."""
        config = self.config
        start, stream = self._start()
        require_equal_replicas(self.trainer.student)
        loader = self._loader(stream)
        log = RunLog(self.folder, self.topology.rank, resumed_step=start)
        watch.finished(start)
        if self.load_sec is not None:
            line = f"loaded in {self.load_sec:.1f} s, going on from step {start} of {config.steps}"
            log.write(start, {"checkpoint/load_sec": self.load_sec}, line)
        if start == 0 and config.eval.every:
            self._evaluate(0, log, watch)
        for step in range(start, config.steps):
            clock = Clock(self.topology.device)
            began = time.perf_counter()
            clock.mark("data")
            rate = learning_rate(config, step)
            watch.phase(f"step {step + 1}")
            try:
                watch.agree(loader.problem(config.watch.data_sec))
                report = self.trainer.step(loader.next(), rate, clock)
            except RunStopped as stop:
                watch.phase("saving where it stopped")
                saved = step == start or step % config.checkpoint.every == 0
                raise stop.at(self._kept(stop, step, stream, saved)) from None
            loader.finished()
            done = step + 1
            watch.finished(done)
            if step == start:
                self.writer.reserve()
            _note(self.writer.poll(), log)
            if done % config.log.every == 0 or done == config.steps:
                values = self._values(report, rate, time.perf_counter() - began)
                log.write(done, values, step_line(done, config.steps, values))
            if _due(done, config.eval.every, config.steps):
                self._evaluate(done, log, watch)
            if _due(done, config.checkpoint.every, config.steps):
                watch.phase(f"checkpoint of step {done}")
                _note(self._save(done, stream), log)
        watch.phase("the end of the last checkpoint")
        _note(self.writer.finish(), log)
        log.close()

    def _start(self) -> tuple[int, RowStream]:
        """Steps done and the stream: from the newest checkpoint when there is one of this very run.

        A run that takes weights from another does so once, before its first step: its own checkpoints say from where.
        """
        stored, stream = (
            stored_progress(self.checkpoints, self.provenance),
            self.data.stream(self.config),
        )
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
            return 0, stream
        _, self.load_sec = resume(self.checkpoints, self.trainer)
        return stored.step, stream.resumed(stored.stream)

    def _loader(self, stream: RowStream) -> Loader:
        topology = self.topology
        return Loader(
            self.data,
            stream,
            self.config,
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
            device=topology.device,
        )

    def _evaluate(self, step: int, log: RunLog, watch: Watch) -> None:
        progress = partial(watch.phase, f"evaluation at step {step}")
        progress()  # the first rows are read before the first batch is told
        values = evaluate(self.trainer, self.data, self.config, progress)
        log.write(step, values, eval_line(step, values))

    def _save(self, step: int, stream: RowStream, *, wait: bool = False) -> SaveReport | None:
        progress = Progress(step=step, stream=stream.state(), provenance=self.provenance)
        return self.writer.save(progress, wait=wait)

    def _kept(self, stop: RunStopped, step: int, stream: RowStream, saved: bool) -> str:
        """Save the last finished step unless it is saved or on its way; what became of it, for people."""
        if step == 0:
            return "no step was finished"
        try:
            self.writer.finish()
            if not saved and not stop.worth_keeping:
                return f"step {step} is not saved, being damaged"
            if not saved:
                self._save(step, stream, wait=True)
        except VpmoeError as error:
            return f"step {step} could not be saved ({str(error).rstrip('.')})"
        return f"step {step} is saved"

    def _values(self, report: StepReport, rate: float, seconds: float) -> dict[str, float]:
        phases = {f"seconds/{phase}": value for phase, value in report.seconds.items()}
        tokens_per_sec = self.config.batch.global_batch_size * self.seq_len / seconds
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
        }


def _note(saved: SaveReport | None, log: RunLog) -> None:
    if saved is not None:
        log.write(saved.step, saved.values, saved.line())


def _newest_step(config: KDConfig) -> int | None:
    progress = read_progress(Path(config.run) / "checkpoints")
    return None if progress is None else progress.step


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
