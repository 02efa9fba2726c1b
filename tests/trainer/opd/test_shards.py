"""The plan of shards follows from the tokens before them, and the anchor keeps its share over any window of steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.opd.configs import MIX, opd_config
from trainer.opd.config import OPDConfig
from trainer.opd.shards import ShardPlan, ShardPlanner, anchors_before

TOKENS = st.lists(st.integers(0, 400), max_size=25)
STAGES = [(100, 1), (101, 3), (700, 2), (None, 6)]


def config(stages: Sequence[tuple[int | None, int]] = STAGES) -> OPDConfig:
    curriculum: list[dict[str, Any]] = [
        {"modes": MIX, "until": until, "rollouts_per_prompt": each} for until, each in stages
    ]
    return opd_config(curriculum=curriculum)


def plans(planner: ShardPlanner, tokens: Sequence[int]) -> list[ShardPlan]:
    """The plan of each of these shards, and of the one behind them."""
    found = []
    for of_shard in tokens:
        found.append(planner.plan())
        planner.sampled(of_shard)
    return [*found, planner.plan()]


@given(TOKENS)
def test_a_plan_follows_from_the_tokens_before_it(tokens: list[int]) -> None:
    prompts = 0
    for number, plan in enumerate(plans(ShardPlanner(config()), tokens)):
        before = sum(tokens[:number])
        is_over = [until is not None and before >= until for until, _ in STAGES]
        assert (plan.shard, plan.tokens_before, plan.stage) == (number, before, sum(is_over))
        assert plan.rollouts_per_prompt == STAGES[plan.stage][1]
        assert plan.prompts * plan.rollouts_per_prompt == 6
        assert plan.first_prompt == prompts, "no prompt is left out, none is taken twice"
        prompts += plan.prompts


@given(TOKENS, st.integers(0, 25))
def test_a_resumed_run_makes_the_same_plan(tokens: list[int], at: int) -> None:
    whole, at = plans(ShardPlanner(config()), tokens), min(at, len(tokens))
    resumed = ShardPlanner(config())
    for of_shard in tokens[:at]:  # as the feed does with what the buffer counts
        resumed.sampled(of_shard)
    assert plans(resumed, tokens[at:]) == whole[at:]
    assert resumed.tokens == sum(tokens)


def test_asking_twice_changes_nothing() -> None:
    planner = ShardPlanner(config())
    planner.sampled(150)
    assert planner.plan() == planner.plan()


@pytest.mark.parametrize(
    ("tokens", "stage"), [(99, 0), (100, 1), (101, 2), (699, 2), (700, 3), (10**12, 3)]
)
def test_a_stage_ends_with_the_shard_that_reaches_its_tokens(tokens: int, stage: int) -> None:
    planner = ShardPlanner(config())
    assert planner.plan().stage == 0
    planner.sampled(tokens)
    assert planner.plan().stage == stage


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.one_of(st.sampled_from([0.0, 0.15, 0.2, 0.25, 0.5, 0.9]), st.floats(0, 0.98)),
)
def test_the_anchor_has_its_share_of_any_window_to_within_a_row(
    rows: list[int], share: float
) -> None:
    before = [0, *itertools.accumulate(rows)]
    anchors = [anchors_before(rollout_rows, share) for rollout_rows in before]
    assert anchors[0] == 0 and anchors == sorted(anchors)
    for first, last in itertools.combinations(range(len(before)), 2):
        of_window = anchors[last] - anchors[first]
        all_rows = before[last] - before[first] + of_window
        assert abs(of_window - Fraction(share) * all_rows) < 1


def test_no_anchor_and_an_even_one() -> None:
    assert [anchors_before(rows, 0.0) for rows in range(5)] == [0] * 5
    assert [anchors_before(rows, 0.5) for rows in range(5)] == list(range(5))
