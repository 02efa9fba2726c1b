"""The learning rate at its corners."""

from __future__ import annotations

import pytest

from tests.trainer.megatron.tiny import tiny_config
from trainer.schedule import learning_rate


def _rates(kind: str) -> list[float]:
    config = tiny_config(
        steps=21, optimizer={"lr": 1.0}, schedule={"kind": kind, "warmup": 4, "min_lr": 0.2}
    )
    return [learning_rate(config, step) for step in range(21)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert _rates("constant")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(_rates("constant")[3:]) == {1.0}


def test_the_cosine_falls_from_the_peak_to_the_minimum_through_their_mean() -> None:
    rates = _rates("cosine")
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.6)
    assert rates[20] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
