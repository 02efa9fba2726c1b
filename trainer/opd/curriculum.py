"""Which stage of the curriculum a shard is sampled in, and which effort the teacher of each prompt shows. Pure.

Both are functions of counts that the buffer keeps (tokens sampled before the shard, the number of the prompt), so a
run that resumes anywhere cannot drift from one that never stopped.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from datastore.harmony import Reasoning
from datastore.order import in_share, share_before
from trainer.opd.config import StageConfig


class Curriculum:
    """The stages of a run, one after another; the last has no end."""

    def __init__(self, stages: Sequence[StageConfig]) -> None:
        self.stages = tuple(stages)
        self._ends = [stage.until for stage in self.stages if stage.until is not None]

    def stage(self, tokens: int) -> tuple[int, StageConfig]:
        """Number and config of the stage of a shard before which `tokens` tokens were sampled."""
        number = bisect.bisect_right(self._ends, tokens)
        return number, self.stages[number]

    @staticmethod
    def reasoning(stage: StageConfig, prompts_P: np.ndarray) -> list[Reasoning]:
        """The effort that the teacher is shown for each prompt, all rollouts of it alike.

        prompts_P: int64, numbers in the endless order of the run. An effort depends on its number and the mix alone.

        Any run of n consecutive numbers holds n * low prompts of low to within 1, n * medium of medium and n * high of
        high to within 2 (each bound exclusive, up to the rounding of doubles): low takes its share of the numbers to
        within 1 (`datastore.order.in_share`). Those that it leaves, so n * (1 - low) to within 1, are numbered again,
        and medium takes m = medium / (medium + high) of them to within 1, so n * medium to within 1 + m; high is what
        remains, n * high to within 1 + (1 - m).
        """
        mix = stage.modes
        low = mix.low / (mix.low + mix.medium + mix.high)  # exactly 1 where there is nothing else
        rest = mix.medium + mix.high
        is_low_P = in_share(prompts_P, low)
        others_P = prompts_P - share_before(prompts_P, low)
        is_medium_P = in_share(others_P, mix.medium / rest if rest else 0.0)
        efforts: tuple[Reasoning, ...] = ("low", "medium", "high")
        return [efforts[i] for i in np.where(is_low_P, 0, np.where(is_medium_P, 1, 2)).tolist()]
