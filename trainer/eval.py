"""Evaluation on the valid split: CE and KL by span and on control tokens, the same for any ranks and micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.config import load_config, override_config, read_mapping
from datastore.manifest import MANIFEST_NAME, target_folder
from trainer.config import KDConfig, RunConfig
from trainer.data import RunData, valid_batches
from trainer.losses.report import QUANTITIES, loss_metrics
from trainer.megatron.step import Trainer
from trainer.opd.config import OPDConfig, as_kd

_LOG = logging.getLogger(__name__)


def load_eval_config(path: Path, overrides: tuple[str, ...]) -> KDConfig:
    """The config of an evaluation from that of a run of either kind; overrides are keys of a KD config.

    The student of an OPD run is evaluated as if it had been distilled offline: against the targets of the run's teacher
    where its dataset has them, else by cross entropy alone.
    """
    if "sampling" not in read_mapping(path):
        return load_config(KDConfig, path, overrides)
    config = load_config(OPDConfig, path)
    teacher: str | None = config.teacher.name
    if not (target_folder(Path(config.dataset), config.teacher.name) / MANIFEST_NAME).exists():
        _LOG.info("%s has no targets of %s: cross entropy alone", config.dataset, teacher)
        teacher = None
    return override_config(KDConfig, as_kd(config, teacher), overrides, str(path))


def evaluated_run(stored: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The provenance that a checkpoint must have: `found`, that of the evaluation; of an OPD run what both have."""
    if "sampling" not in stored["config"]:
        return found
    shared = {key: found["config"][key] for key in RunConfig.model_fields}
    data = {key: found["data"][key] for key in ("dataset", "tokenizer")}
    return {"config": stored["config"] | shared, "data": stored["data"] | data}


def evaluate(
    trainer: Trainer,
    data: RunData,
    config: KDConfig,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over the first `eval.rows` valid rows, named `eval/ce/reasoning` and so on. Every rank calls it.

    progress: called before every batch.

    Rows are read in order; sums are float64, so the means repeat to about 1e-7 whatever cuts them.
    """
    topology = trainer.topology
    ones = torch.ones(2, dtype=torch.int64, device=topology.device)
    sums_CM = torch.zeros(3, len(QUANTITIES), dtype=torch.float64, device=topology.device)
    for batch in valid_batches(
        data,
        rows=config.eval.rows,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        micro_batch_size=config.batch.micro_batch_size,
    ):
        progress()
        sums_CM += trainer.evaluate(batch.to(topology.device), ones)
    return loss_metrics(_span_means(topology.sum(sums_CM)), prefix="eval")


def _span_means(sums_CM: torch.Tensor) -> torch.Tensor:
    """Loss and weight were summed with a span count of 1; the objective divides them by the span's positions."""
    positions_C = sums_CM[:, QUANTITIES.index("positions")].clamp(min=1)
    for name in ("loss", "weight"):
        sums_CM[:, QUANTITIES.index(name)] /= positions_C
    return sums_CM
