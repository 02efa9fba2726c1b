"""Runs of the real command: killed at a random moment and started again, resumed on other processes, refused,
evaluated.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.runs import (
    STEPS,
    command,
    environment,
    records,
    run_program,
    steps_of,
    train,
    write_run_config,
)
from tests.distributed.stored import assert_same_tensors, newest

ASIDE = "checkpoint.asynchronous=true"


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_config(tmp_path_factory.mktemp("runs"))


def _train_and_kill(processes: int, config: Path, run: Path) -> None:
    """Start with asynchronous checkpoints, and SIGKILL every process of it at a random moment after the first."""
    process = subprocess.Popen(
        command(processes, "kd", str(config), f"run={run}", ASIDE),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / "latest").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    steps = random.randint(3, STEPS - 1)
    while len(steps_of(run, "loss/total")) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))
    for pid in [process.pid, *_descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _assert_same_end(one: Path, other: Path) -> None:
    assert_same_tensors(newest(one / "checkpoints"), newest(other / "checkpoints"))
    for name in ("loss/total", "eval/total", "grad_norm", "lr"):
        assert steps_of(one, name) == steps_of(other, name)


@pytest.fixture(scope="module")
def whole(config_path: Path) -> Path:
    """A run on one process that nothing stopped."""
    run = config_path.parent / "whole"
    train(1, config_path, run)
    shares = [share for _, share in steps_of(run, "loss/scored_share/total")]
    assert shares == pytest.approx([0.75] * STEPS, abs=0.01)
    return run


@pytest.mark.slow
def test_a_killed_run_ends_as_if_never_stopped(config_path: Path, whole: Path) -> None:
    run = config_path.parent / "killed"
    _train_and_kill(1, config_path, run)
    checkpoints = run / "checkpoints"
    (checkpoints / ".tmp-step-00000099").mkdir()
    shutil.copytree(
        checkpoints / (checkpoints / "latest").read_text().strip(), checkpoints / "step-00000099"
    )
    train(1, config_path, run)
    _assert_same_end(whole, run)
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "latest",
        "step-00000006",
        "step-00000008",
    ]


@pytest.mark.slow
def test_two_processes_killed_and_resumed_on_two_and_on_one(config_path: Path, whole: Path) -> None:
    folder = config_path.parent
    train(2, config_path, folder / "two")
    _train_and_kill(2, config_path, folder / "two-killed")
    shutil.copytree(folder / "two-killed", folder / "two-to-one")
    train(2, config_path, folder / "two-killed")
    _assert_same_end(folder / "two", folder / "two-killed")

    train(1, config_path, folder / "two-to-one")
    for name in ("loss/positions/reasoning", "loss/scored_share/final"):
        assert steps_of(folder / "two-to-one", name) == steps_of(whole, name)
    for (_, got), (_, expected) in zip(
        steps_of(folder / "two-to-one", "loss/total"), steps_of(whole, "loss/total"), strict=True
    ):
        assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_evaluation_does_not_depend_on_processes_or_micro_batches(
    config_path: Path, whole: Path
) -> None:
    values = []
    for processes, size in [(1, 2), (1, 2), (1, 4), (2, 2)]:
        done = run_program(processes, "eval", str(whole), f"batch.micro_batch_size={size}")
        assert done.returncode == 0, done.stderr[-3000:]
        values.append(json.loads((whole / "eval.json").read_text()))
    at_the_end = [record for record in records(whole) if "eval/total" in record][-1]
    assert values[0] == values[1] == at_the_end
    for other in values[2:]:
        assert other == pytest.approx(values[0], rel=1e-6)


@pytest.mark.slow
def test_another_config_is_refused_with_the_difference(config_path: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    done = run_program(1, "kd", str(config_path), f"run={whole}", "optimizer.lr=0.5", "log.every=2")
    assert done.returncode == 1
    assert "optimizer.lr  0.01        0.5" in done.stderr
    assert "log.every" not in done.stderr and "Traceback" not in done.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_loses_nothing(config_path: Path, whole: Path) -> None:
    run = config_path.parent / "full-disk"
    program = " ".join(command(1, "kd", str(config_path), f"run={run}", ASIDE))
    limited = subprocess.run(
        ["bash", "-c", f"ulimit -f 2000; exec {program}"],  # files of at most 2 MB
        capture_output=True,
        text=True,
        timeout=280,
        env=environment(),
    )
    assert limited.returncode == 1, limited.stderr[-3000:]
    assert "checkpoint step-00000003 could not be written" in limited.stderr
    assert "GiB free" in limited.stderr and "run the same command" in limited.stderr
    assert list((run / "checkpoints").iterdir()) == []
    train(1, config_path, run)
    _assert_same_end(whole, run)
