"""Stages at their borders, and the mix of efforts over any run of prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.opd.config import ModeMix, StageConfig
from trainer.opd.curriculum import Curriculum

EFFORTS = ("low", "medium", "high")
BOUNDS = {"low": 1, "medium": 2, "high": 2}
ROUNDING = 1e-3  # of p * share in double, for p up to 2^40


def a_stage(low: float, medium: float, high: float, until: int | None = None) -> StageConfig:
    return StageConfig(until=until, modes=ModeMix(low=low, medium=medium, high=high))


# The three stages of the design.
STAGES = (a_stage(0.7, 0.3, 0, 100), a_stage(0.2, 0.6, 0.2, 250), a_stage(0.1, 0.3, 0.6))


@st.composite
def mixes(draw) -> StageConfig:
    """Shares in steps of 1 / n, among them 0 and 1."""
    whole = draw(st.integers(1, 1000))
    low = draw(st.integers(0, whole))
    medium = draw(st.integers(0, whole - low))
    return a_stage(low / whole, medium / whole, (whole - low - medium) / whole)


def test_a_stage_ends_when_its_tokens_have_been_sampled():
    curriculum = Curriculum(STAGES)
    numbers = {tokens: curriculum.stage(tokens)[0] for tokens in (0, 99, 100, 249, 250, 10**12)}
    assert numbers == {0: 0, 99: 0, 100: 1, 249: 1, 250: 2, 10**12: 2}
    assert [curriculum.stage(t)[1] for t in (0, 100, 250)] == list(STAGES)
    assert Curriculum(STAGES[2:]).stage(0) == (0, STAGES[2])


@given(st.lists(st.integers(1, 1000), unique=True, max_size=6), st.integers(0, 1100))
def test_the_stage_is_the_first_that_has_not_ended(ends, tokens):
    stages = [a_stage(1, 0, 0, until) for until in [*sorted(ends), None]]
    number = next(i for i, s in enumerate(stages) if s.until is None or tokens < s.until)
    assert Curriculum(stages).stage(tokens) == (number, stages[number])


@pytest.mark.parametrize("stage", STAGES)
def test_ten_prompts_hold_the_mix_of_the_design(stage):
    efforts = np.array(Curriculum(STAGES).reasoning(stage, np.arange(1000)))
    for effort in EFFORTS:
        share = getattr(stage.modes, effort)
        assert abs((efforts == effort).sum() - 1000 * share) < BOUNDS[effort]
        if share == 0:
            assert effort not in efforts


def worst_windows(efforts: np.ndarray, effort: str, share: float) -> float:
    """How far the count of any window of any length lies from its share: all of them, by their differences."""
    counts = np.concatenate([[0], np.cumsum(efforts == effort)])
    excess = counts - share * np.arange(len(counts))
    return float(np.abs(excess[:, None] - excess[None, :]).max())


@given(mixes(), st.integers(0, 2**40))
@settings(max_examples=150, deadline=None)
def test_every_run_of_prompts_holds_the_mix_to_within_the_bound(stage, first):
    efforts = np.array(Curriculum(STAGES).reasoning(stage, np.arange(first, first + 400)))
    for effort in EFFORTS:
        share = getattr(stage.modes, effort)
        assert worst_windows(efforts, effort, share) < BOUNDS[effort] + ROUNDING
        assert share > 0 or effort not in efforts


@given(mixes(), st.lists(st.integers(0, 2**40), max_size=30))
@settings(max_examples=60, deadline=None)
def test_an_effort_depends_on_its_prompt_alone(stage, prompts):
    reasoning = Curriculum(STAGES).reasoning
    together = reasoning(stage, np.array(prompts, dtype=np.int64))
    alone = [reasoning(stage, np.array([p], dtype=np.int64))[0] for p in prompts]
    assert together == alone
    assert set(together) <= set(EFFORTS)
