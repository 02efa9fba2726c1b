"""`vpmoe-train kd`: distillation from stored targets, from the first step or from the newest checkpoint."""

from __future__ import annotations

import logging
from typing import Any

from common.files import write_json
from trainer.config import KDConfig
from trainer.data import Loader, RunData
from trainer.eval import evaluate, evaluated_run
from trainer.megatron.topology import Topology, check_run, distributed
from trainer.megatron.watch import Watch
from trainer.megatron.weights import load_weights
from trainer.provenance import require_same_run
from trainer.run import RunLog, eval_line, step_line
from trainer.training import Feed, TrainingRun, guarded

_LOG = logging.getLogger(__name__)


def run_kd(config: KDConfig) -> None:
    """Train until `steps`; the same command goes on where a killed one was saved. Every rank calls it."""
    with guarded(config) as (topology, watch):
        KDRun(config, topology).train(watch)


def run_eval(config: KDConfig) -> dict[str, float]:
    """Evaluate the newest checkpoint of a run of either kind (trainer/eval.py, `load_eval_config`).

    Rank 0 tells it and writes eval.json. All ranks return the same.
    """
    check_run(config)
    with distributed(
        config.device, config.parallel, config.seed, deterministic=config.deterministic
    ) as topology:
        run = KDRun(config, topology)
        progress = load_weights(run.checkpoints, run.trainer.student)
        stored = progress.provenance
        require_same_run(stored, evaluated_run(stored, run.provenance))
        values = evaluate(run.trainer, run.data, config)
        if topology.rank == 0:
            write_json(run.folder / "eval.json", {"step": progress.step} | values)
        _LOG.info("%s", eval_line(progress.step, values))
        return values


class KDRun(TrainingRun):
    """A run over a dataset and its stored targets."""

    config: KDConfig

    def __init__(self, config: KDConfig, topology: Topology) -> None:
        self.data = RunData.open(config)
        seq_len = self.data.dataset.manifest.seq_len
        super().__init__(config, topology, seq_len, self.data.provenance())

    @property
    def eval_every(self) -> int:
        return self.config.eval.every

    def feed(self, stored: dict[str, Any] | None, log: RunLog | None = None) -> Loader:
        stream = self.data.stream(self.config)
        return Loader(
            self.data,
            stream if stored is None else stream.resumed(stored),
            self.config,
            dp_rank=self.topology.dp_rank,
            dp_size=self.topology.dp_size,
            device=self.topology.device,
        )

    def evaluate(self, feed: Feed, watch: Watch) -> dict[str, float]:
        begin = watch.phase_again
        return evaluate(self.trainer, self.data, self.config, begin)

    def step_line(self, step: int, values: dict[str, float]) -> str:
        return step_line(step, self.config.steps, values)
