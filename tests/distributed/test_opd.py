"""OPD runs of the real command against a served teacher: to the end, killed, without a teacher, with another."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import load_config
from datastore.reader import Dataset, TargetStore
from datastore.rollout_reader import RolloutReader
from tests.distributed.opd_runs import STEPS, opd_command, train, write_opd_config
from tests.distributed.runs import environment, records, run_program, steps_of
from tests.distributed.started import plain
from tests.distributed.stored import assert_same_tensors, newest
from tests.trainer.opd.served import NAME, ServerProcess
from trainer.opd.config import OPDConfig
from trainer.opd.shards import anchors_before

pytestmark = pytest.mark.slow
# Measures of a step that do not tell the time.
_OF_TRAINING = (
    "loss/total",
    "grad_norm",
    "lr",
    "loss/reverse_kl/total",
    "rollouts/valid",
    "opd/tokens",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A served teacher made from the dataset of the runs."""
    folder = tmp_path_factory.mktemp("opd")
    process = ServerProcess("--dataset", str(folder / "data"))
    process.folder = folder
    write_opd_config(folder, process.url)
    with process:
        yield process


@pytest.fixture(scope="module")
def config(teacher: ServerProcess) -> Path:
    return teacher.folder / "opd.yaml"


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """A run that nothing stopped."""
    run = config.parent / "whole"
    train(1, config, run)
    return run


def _assert_same_run(one: Path, other: Path) -> None:
    """The same weights, measures and rollouts, bit by bit."""
    assert_same_tensors(newest(one / "checkpoints"), newest(other / "checkpoints"))
    for name in _OF_TRAINING:
        assert steps_of(one, name) == steps_of(other, name), name
    first, second = (run / "buffer" for run in (one, other))
    shards = sorted(path.relative_to(first) for path in first.rglob("*.arrow"))
    assert (
        shards
        and [p for p in shards if (first / p).read_bytes() != (second / p).read_bytes()] == []
    )


def test_the_loop_does_what_the_config_says(config: Path, whole: Path) -> None:
    loaded = load_config(OPDConfig, config)
    buffer = RolloutReader.open_reader(whole / "buffer")
    assert buffer.num_scored == buffer.num_sampled == STEPS
    tokens, prompts, rows = 0, 0, 0
    for shard in range(STEPS):
        rollouts = buffer.rollouts(shard)
        each = 1 if tokens < 150 else 2
        order = [(prompts + n // each, n % each) for n in range(4)]
        assert [(rollout.prompt, rollout.sample) for rollout in rollouts] == order
        assert {rollout.policy_version for rollout in rollouts} == {max(0, shard - 1)}
        tokens += sum(len(rollout.logprobs_S) for rollout in rollouts)
        prompts += 4 // each
        of_step = next(record for record in records(whole) if record["step"] == shard + 1)
        assert of_step["opd/tokens"] == tokens
        assert of_step["buffer/age"] == min(shard, 1)
        before, rows = rows, rows + len(buffer.rows(shard))
        share = loaded.anchor_share
        anchors = anchors_before(rows, share) - anchors_before(before, share)
        assert of_step["buffer/anchor_rows"] == anchors
    assert tokens > 150, "the second stage of the curriculum was reached"


def test_a_finished_buffer_is_a_dataset_that_verifies_and_trains(config: Path, whole: Path) -> None:
    buffer = whole / "buffer"
    store = TargetStore.open(Dataset.open(buffer), NAME)
    assert store.scored_rows("train").size == store.dataset.num_rows("train")
    program = str(Path(sys.executable).with_name("vpmoe-data"))
    done = subprocess.run([program, "verify", str(buffer)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kd = config.parent / "replay.yaml"
    shared = load_config(OPDConfig, config).resolved()
    for key in ("sampling", "curriculum", "anchor_share", "staleness", "samples"):
        del shared[key]
    kd.write_text(
        json.dumps(
            shared
            | {
                "run": str(config.parent / "replay"),
                "dataset": str(buffer),
                "teacher": NAME,
                "steps": 2,
                "batch": {"global_batch_size": 2, "micro_batch_size": 1},
                "loss": {"kd_weight": 1.0, "chunk_tokens": 64},
                "eval": {"every": 2},
            }
        )
    )
    done = run_program(1, "kd", str(kd))
    assert done.returncode == 0, done.stderr[-3000:]


def test_killed_at_random_moments_it_ends_as_if_never_stopped(config: Path, whole: Path) -> None:
    run = config.parent / "killed"
    for _ in range(3):
        process = subprocess.Popen(
            opd_command(1, config, run),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        before, deadline = _shards(run), time.monotonic() + 240
        while _shards(run) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    train(1, config, run)
    _assert_same_run(whole, run)


def _shards(run: Path) -> int:
    return len(list((run / "buffer" / "rollouts").rglob("*.json")))


def test_without_a_teacher_it_waits_and_goes_on(
    teacher: ServerProcess, config: Path, whole: Path
) -> None:
    run = config.parent / "waits"
    with plain(1, *opd_command(1, config, run)) as started:
        started.wait_until(lambda: len(steps_of(run, "loss/total")) >= 2)
        teacher.kill()
        try:
            started.wait_until(lambda: "does not answer" in started.said())
            done = len(steps_of(run, "loss/total"))
            time.sleep(3)
            assert len(steps_of(run, "loss/total")) <= done + 1
        finally:
            teacher.start()
        assert started.codes(240) == [0], started.said()[-4000:]
    _assert_same_run(whole, run)


def test_another_teacher_at_the_address_is_refused(teacher: ServerProcess, config: Path) -> None:
    run = config.parent / "exchanged"
    with plain(1, *opd_command(1, config, run)) as started:
        started.wait_until(lambda: len(steps_of(run, "loss/total")) >= 2)
        teacher.kill()
        teacher.start("--weights", "second")
        try:
            assert started.codes(240) == [1]
            assert "another teacher" in "\n".join(started.errors()), started.said()[-4000:]
            done = run_program(1, "opd", str(config), f"run={run}")
            assert done.returncode == 1 and "teacher" in done.stderr
        finally:
            teacher.kill()
            teacher.start()


def test_two_processes_sample_and_train_like_one(config: Path, whole: Path) -> None:
    run = config.parent / "two"
    train(2, config, run)
    for name in ("loss/total", "loss/reverse_kl/total", "opd/tokens"):
        got, expected = dict(steps_of(run, name)), dict(steps_of(whole, name))
        assert got[1] == pytest.approx(expected[1], rel=1e-4), name
