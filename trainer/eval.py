"""Evaluation on the valid split: CE and KL by span and on control tokens, the same for any ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainer.config import KDConfig
from trainer.data import RunData, valid_batches
from trainer.losses.report import QUANTITIES, loss_metrics
from trainer.megatron.step import Trainer


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
