"""The learning rate as a pure function of the step, so that a checkpoint needs no scheduler state beyond the step."""

from __future__ import annotations

import math

from trainer.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Rate of optimizer step `step`, counted from 0: (step + 1) / warmup of the peak, then constant or a half cosine.

    The cosine starts at the peak after the warmup and ends at min_lr on the last step.
    """
    peak, of = config.optimizer.lr, config.schedule
    if step < of.warmup:
        return peak * (step + 1) / of.warmup
    if of.kind == "constant":
        return peak
    progress = (step - of.warmup) / max(config.steps - 1 - of.warmup, 1)
    return of.min_lr + (peak - of.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
