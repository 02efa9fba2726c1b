"""An OPD feed over a real buffer and a served teacher, for processes of their own; rollouts are made by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from datastore.reader import Dataset
from datastore.rollout import Rollout
from datastore.rollout_reader import RolloutReader
from tests.datastore import conftest as made
from tests.datastore.rollout_cases import SEQ_LEN, rollout
from tests.trainer.opd.configs import MIX, opd_config
from trainer.config import WatchConfig
from trainer.megatron.topology import Topology
from trainer.megatron.watch import Watch
from trainer.opd.config import OPDConfig
from trainer.opd.data import OPDData
from trainer.opd.feed import OPDFeed
from trainer.opd.scoring import Scoring
from trainer.opd.shards import ShardPlan


def topology(
    rank: int, world: int, *, dp_rank: int | None = None, dp_size: int | None = None
) -> Topology:
    """Of this process, in one data-parallel group with all; or as if it were `dp_rank` of `dp_size`, alone."""
    group = dist.group.WORLD
    assert group is not None
    return Topology(
        device=torch.device("cpu"),
        rank=rank,
        world_size=world,
        dp_rank=rank if dp_rank is None else dp_rank,
        dp_size=dp_size or world,
        tp_rank=0,
        tp_size=1,
        ep_rank=0,
        ep_size=1,
        dp_group=group,
        tp_group=group,
    )


@contextlib.contextmanager
def watched(of: Topology) -> Iterator[Watch]:
    """The watch of a run that has no checkpoint."""
    with Watch(WatchConfig(), of, lambda: None) as watch:
        yield watch


def feed_config(**changes: Any) -> OPDConfig:
    """Six rollouts a step, two of a prompt once 200 tokens are sampled; two anchor rows beside three of rollouts."""
    stages = [{"until": 200, "modes": MIX}, {"modes": MIX, "rollouts_per_prompt": 2}]
    return opd_config(**({"curriculum": stages, "anchor_share": 0.4, "steps": 4} | changes))


def write_data(folder: Path) -> Path:
    """A dataset of seven train rows and two valid ones."""
    rows = [made.pack([made.document(number)], SEQ_LEN) for number in range(9)]
    made.write_dataset(folder, {"train": [rows[:7]], "valid": [rows[7:]]}, seq_len=SEQ_LEN)
    return folder


class HandmadeProducer:
    """Gives rollouts of every form for what is planned, on rank 0. asked: each plan with its version."""

    occupied = 1.0

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.asked: list[tuple[ShardPlan, int]] = []

    def shard(
        self, plan: ShardPlan, version: int, progress: Callable[[int], None]
    ) -> list[Rollout]:
        self.asked.append((plan, version))
        if self._rank:
            return []
        prompts = range(plan.first_prompt, plan.first_prompt + plan.prompts)
        return [
            rollout(prompt, sample=sample, keep=(None, 9, 24)[prompt % 3], version=version)
            for prompt in prompts
            for sample in range(plan.rollouts_per_prompt)
        ]


def feed_of(
    config: OPDConfig,
    of: Topology,
    data: Path,
    buffer: RolloutReader,
    *,
    scoring: Scoring | None = None,
    stored: dict[str, Any] | None = None,
) -> OPDFeed:
    """The feed of a run over these, with a producer of its own."""
    producer: Any = HandmadeProducer(of.rank)
    opened = OPDData(Dataset.open(data), config)
    return OPDFeed(config, of, opened, producer, buffer, scoring, None, stored)
