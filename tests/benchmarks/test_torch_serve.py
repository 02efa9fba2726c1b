"""The engine of the torch server, driven by the server's own queue: the targets of its scorer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.torch_serve import TorchEngine, small_teacher
from benchmarks.torch_teacher import TorchScorer
from datastore.serve_engine import ScoringQueue
from tests.benchmarks.test_torch_teacher import folder, requests
from tests.datastore.waiting import wait_until

__all__ = ["folder"]


@pytest.fixture
def queue(folder: Path) -> Iterator[ScoringQueue]:
    scorer = TorchScorer(small_teacher("small", folder, "cpu"), folder)
    made = ScoringQueue(lambda: (TorchEngine(scorer), {}), queue_tokens=1000, batch_tokens=100_000)
    yield made
    assert made.stop(30)


def test_a_request_is_answered_with_the_rows_of_the_scorer(
    queue: ScoringQueue,
    folder: Path,
) -> None:
    asked = requests()
    expected = TorchScorer(small_teacher("small", folder, "cpu"), folder).score_packed(asked)
    wait_until(lambda: queue.state == "ready")
    answered = queue.submit(asked).future.result(60)
    with_targets = [i for i, request in enumerate(asked) if len(request.positions_P)]
    assert sorted(answered) == with_targets != []
    for i in with_targets:
        assert np.array_equal(answered[i], expected[i])
