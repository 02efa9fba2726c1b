"""What each micro-shard of the buffer samples, and how many rows of the anchor each step takes. Pure.

Everything follows from the tokens that the shards before it hold: a run that goes on makes the same plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.opd.config import OPDConfig
from trainer.opd.curriculum import Curriculum


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Shard number `shard` samples `rollouts_per_prompt` rollouts of each of `prompts` prompts from `first_prompt` on.

    stage: of the curriculum. tokens_before: sampled in all earlier shards.
    """

    shard: int
    stage: int
    first_prompt: int
    prompts: int
    rollouts_per_prompt: int
    tokens_before: int


class ShardPlanner:
    """The plan of one shard after another: `plan` for the next, `sampled` when it holds so many sampled tokens."""

    def __init__(self, config: OPDConfig) -> None:
        self._config = config
        self._curriculum = Curriculum(config.curriculum)
        self._shard = self._prompts = 0
        self.tokens = 0

    def plan(self) -> ShardPlan:
        """Of the next shard."""
        stage, of_stage = self._curriculum.stage(self.tokens)
        return ShardPlan(
            shard=self._shard,
            stage=stage,
            first_prompt=self._prompts,
            prompts=self._config.batch.rollouts // of_stage.rollouts_per_prompt,
            rollouts_per_prompt=of_stage.rollouts_per_prompt,
            tokens_before=self.tokens,
        )

    def sampled(self, tokens: int) -> None:
        """The planned shard is there."""
        self._prompts += self.plan().prompts
        self._shard += 1
        self.tokens += tokens


def anchors_before(rollout_rows: int, share: float) -> int:
    """Rows of the anchor beside the first `rollout_rows` rows of rollouts: floor(r * share / (1 - share)).

    So over any run of steps the anchor's part of all rows is `share`, within one row.
    """
    return math.floor(rollout_rows * share / (1 - share))
