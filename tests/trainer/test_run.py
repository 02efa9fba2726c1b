"""The folder of a run: no step twice after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trainer.router_load import router_metrics
from trainer.run import RunLog


def _log(folder: Path, resumed_step: int, steps: range) -> None:
    log = RunLog(folder, 0, resumed_step=resumed_step)
    for step in steps:
        log.write(step, {"loss/total": float(step)}, "line")
    log.close()


def _steps(folder: Path) -> list[int]:
    return [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_records_after_the_resumed_step_are_dropped(tmp_path) -> None:
    _log(tmp_path, 0, range(0, 7))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss/to')
    _log(tmp_path, 4, range(5, 7))
    assert _steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6]


def test_a_log_knows_whether_the_step_it_goes_on_from_is_evaluated(tmp_path) -> None:
    log = RunLog(tmp_path, 0, resumed_step=0)
    assert not log.is_evaluated
    for step in (1, 2, 3):
        log.write(step, {"loss/total": 1.0}, "line")
    log.write(2, {"eval/ce/final": 1.0}, "line")
    log.close()
    found = {}
    for step in (3, 2):  # the later first: what follows a step is dropped
        again = RunLog(tmp_path, 0, resumed_step=step)
        found[step] = again.is_evaluated
        again.close()
    assert found == {3: False, 2: True}


def test_a_run_without_a_checkpoint_begins_its_records_again(tmp_path) -> None:
    _log(tmp_path, 0, range(0, 3))
    _log(tmp_path, 0, range(0, 2))
    assert _steps(tmp_path) == [0, 1]


def test_other_ranks_write_nothing(tmp_path) -> None:
    log = RunLog(tmp_path, 1, resumed_step=0)
    log.write(1, {"loss/total": 1.0}, "line")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_router_load_of_known_counts() -> None:
    even = router_metrics(torch.full((2, 4), 6.0), torch.zeros(2, 4))
    assert even["router/load_entropy"] == pytest.approx(1.0)
    assert (even["router/max_load"], even["router/dead_experts"]) == (1.0, 0.0)
    uneven = router_metrics(
        torch.tensor([[8.0, 0, 0, 0], [2, 2, 2, 2]]),
        torch.tensor([[0.0, 0, 0, 0], [-0.5, 0, 0, 0.25]]),
    )
    assert uneven["router/load_entropy"] == pytest.approx(0.5)
    assert uneven["router/max_load"] == 4.0
    assert uneven["router/dead_experts"] == 3.0
    assert uneven["router/bias_range"] == 0.75
