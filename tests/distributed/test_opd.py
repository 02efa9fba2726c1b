"""OPD runs of the real command against a served teacher: to the end, killed, without a teacher, with another.

On CPU, deterministic: what is disturbed must end bit by bit as what is not.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from datastore.reader import Dataset, TargetStore
from datastore.rollout_reader import RolloutReader
from tests.distributed.opd_runs import (
    ANCHOR_SHARE,
    ROLLOUTS,
    STAGE_TOKENS,
    STEPS,
    SYNCHRONOUS,
    SYNCHRONOUS_STEPS,
    assert_same_run,
    durable,
    kd_config,
    kill_while_it_samples,
    opd_command,
    steps_told,
    train,
    warm_up,
    write_opd_config,
)
from tests.distributed.runs import records, run_program
from tests.distributed.started import newest, plain, steps
from tests.trainer.opd.served import NAME, ServerProcess, free_port

pytestmark = pytest.mark.slow
TWO_STEPS = "steps=3"
SIGNALLED = (sys.executable, str(Path(__file__).with_name("signalled.py")))
# Float sums in another order, over a loss of which the parts cancel.
SAME_STEP = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, and the dataset `data` that they and the teacher are made from."""
    return tmp_path_factory.mktemp("opd")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Iterator[ServerProcess]:
    """The served teacher of all runs."""
    process = ServerProcess("--dataset", str(folder / "data"))
    write_opd_config(folder, process.url)
    with process:
        yield process


@pytest.fixture(scope="module")
def config(folder: Path, teacher: ServerProcess) -> Path:
    path = folder / "opd.yaml"
    warm_up(path)
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """A run that nothing stopped."""
    run = config.parent / "whole"
    train(1, config, run)
    return run


@pytest.fixture(scope="module")
def synchronous(config: Path) -> Path:
    """The same of the synchronous loop."""
    run = config.parent / "synchronous"
    train(1, config, run, *SYNCHRONOUS)
    return run


def test_every_step_trains_the_shard_that_was_planned_for_it(
    whole: Path, synchronous: Path
) -> None:
    for run, staleness, last in ((whole, 1, STEPS), (synchronous, 0, SYNCHRONOUS_STEPS)):
        buffer, told = RolloutReader.open_reader(run / "buffer"), steps_told(run)
        assert buffer.num_scored == buffer.num_sampled == last and list(told) == [
            *range(1, last + 1)
        ]
        tokens = prompts = 0
        stages, documents = set(), {}
        for shard in range(last):
            rollouts = buffer.rollouts(shard)
            stage = int(tokens >= STAGE_TOKENS)
            each = (1, 2)[stage]
            order = [(prompts + n // each, n % each) for n in range(ROLLOUTS)]
            assert [(rollout.prompt, rollout.sample) for rollout in rollouts] == order
            assert {rollout.policy_version for rollout in rollouts} == {max(0, shard - staleness)}
            assert {rollout.reasoning for rollout in rollouts} <= ({"low", "medium"}, {"high"})[
                stage
            ]
            documents |= {rollout.prompt: rollout.doc_id for rollout in rollouts}
            tokens += sum(len(rollout.logprobs_S) for rollout in rollouts)
            prompts += ROLLOUTS // each
            stages.add(stage)
            assert told[shard + 1]["opd/tokens"] == tokens
            assert told[shard + 1]["buffer/age"] == min(shard, staleness)
            assert told[shard + 1]["buffer/depth"] == min(staleness + 1, last - shard)
        assert stages == {0, 1}, "the second stage of the curriculum was reached"
        # 21 train documents: no prompt comes twice before each has come once.
        assert len(set(documents.values())) == len(documents) == prompts < 21


def test_rows_of_the_anchor_are_their_share(folder: Path, whole: Path) -> None:
    data = Dataset.open(folder / "data")
    (trained,) = {int((data.row("train", index).spans_T > 0).sum()) for index in range(21)}
    told, buffer = steps_told(whole), RolloutReader.open_reader(whole / "buffer")
    share = Fraction(str(ANCHOR_SHARE))
    rows = anchors = 0
    for shard in range(STEPS):
        of_step = told[shard + 1]
        rows += buffer.counts(shard).rows
        before, anchors = anchors, math.floor(rows * share / (1 - share))
        assert of_step["buffer/rows"] == buffer.counts(shard).rows
        assert of_step["buffer/anchor_rows"] == anchors - before
        for_anchor = sum(
            of_step[f"loss/positions/{span}"] - of_step.get(f"loss/sampled/{span}", 0.0)
            for span in ("reasoning", "final")
        )  # a step's rollouts may end before their final span: then nothing is told of it
        assert for_anchor == trained * (anchors - before)
    assert anchors > STEPS


def test_what_a_step_measured_is_told(whole: Path) -> None:
    buffer, told = RolloutReader.open_reader(whole / "buffer"), steps_told(whole)
    for shard in range(STEPS):
        of_step, rollouts = told[shard + 1], buffer.rollouts(shard)
        verdicts = [rollout.verdict for rollout in rollouts]
        assert of_step["rollouts/valid"] == verdicts.count("valid") / ROLLOUTS
        for verdict in set(verdicts):
            share = of_step[f"rollouts/verdict/{verdict}"]
            assert share == verdicts.count(verdict) / ROLLOUTS
        for mode in {rollout.reasoning for rollout in rollouts}:
            lengths = [len(r.logprobs_S) for r in rollouts if r.reasoning == mode]
            assert of_step[f"rollouts/mode/{mode}"] == len(lengths)
            assert of_step[f"rollouts/length/{mode}"] == sum(lengths) / len(lengths)
        assert of_step["buffer/scored"] >= 1
        assert of_step["seconds/sampling"] >= 0 and of_step["seconds/teacher"] >= 0
    # Step 1 trains with the weights that sampled: its reverse KL is that of the stored logprobs.
    for number, span in ((1, "reasoning"), (2, "final")):
        gaps = [
            scored.sampling_logprob_S[spans_S == number]
            - scored.teacher_logprob_S[spans_S == number]
            for rollout, scored in zip(buffer.rollouts(0), buffer.scored_tokens(0), strict=True)
            for spans_S in [rollout.spans_T[rollout.spans_T > 0]]
        ]
        mean = float(np.concatenate(gaps).mean())
        assert told[1][f"loss/reverse_kl/{span}"] == pytest.approx(mean, abs=1e-4)
    evaluated = [record for record in records(whole) if "eval/valid" in record]
    assert [record["step"] for record in evaluated] == [0, 4, STEPS]
    assert all("eval/reverse_kl/total" in record for record in evaluated)
    samples = [(of["step"], of["prompt"]) for of in _lines(whole / "samples.jsonl")]
    first = [[rollout.prompt for rollout in buffer.rollouts(shard)][:2] for shard in (2, 5)]
    assert samples == [(3, prompt) for prompt in first[0]] + [(6, prompt) for prompt in first[1]]


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_a_finished_buffer_is_a_dataset_that_verifies_and_trains(config: Path, whole: Path) -> None:
    buffer = whole / "buffer"
    store = TargetStore.open(Dataset.open(buffer), NAME)
    assert store.scored_rows("train").size == store.dataset.num_rows("train") > 0
    assert store.scored_rows("valid").size == store.dataset.num_rows("valid") > 0
    program = str(Path(sys.executable).with_name("vpmoe-data"))
    verified = subprocess.run([program, "verify", str(buffer)], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stderr
    replay = kd_config(
        config,
        "replay",
        dataset=str(buffer),
        teacher=NAME,
        steps=2,
        batch={"global_batch_size": 2, "micro_batch_size": 1},
        loss={"kd_weight": 1.0, "chunk_tokens": 64},
        eval={"every": 2},
    )
    done = run_program(1, "kd", str(replay))
    assert done.returncode == 0, done.stderr[-4000:]
    told = steps_told(replay.with_suffix(""))
    assert [of_step["loss/scored_share/total"] for of_step in told.values()] == [1, 1]


def test_a_run_that_was_stopped_before_the_seal_is_sealed(config: Path, whole: Path) -> None:
    run = config.parent / "unsealed"
    shutil.copytree(whole, run)
    (run / "buffer" / "manifest.json").unlink()
    train(1, config, run)
    assert_same_run(whole, run)


def test_killed_at_random_moments_it_ends_as_if_never_stopped(config: Path, whole: Path) -> None:
    run = config.parent / "killed"
    kept: dict = {}
    for _ in range(3):
        kill_while_it_samples(config, run, STEPS)
        kept |= durable(run)
    train(1, config, run)
    assert_same_run(whole, run)
    assert kept and kept.items() <= durable(run).items(), "nothing is sampled or scored again"


def test_the_synchronous_loop_killed_ends_as_if_never_stopped(
    config: Path, synchronous: Path
) -> None:
    run = config.parent / "killed-synchronous"
    kill_while_it_samples(config, run, SYNCHRONOUS_STEPS, *SYNCHRONOUS)
    kept = durable(run)
    train(1, config, run, *SYNCHRONOUS)
    assert_same_run(synchronous, run)
    assert kept and kept.items() <= durable(run).items()


def test_without_a_teacher_it_waits_and_goes_on(
    teacher: ServerProcess, config: Path, whole: Path
) -> None:
    run = config.parent / "waits"
    with plain(1, *opd_command(1, config, run)) as started:
        started.wait_until(lambda: steps(run) >= 2)
        teacher.kill()
        try:
            buffer = RolloutReader.open_reader(run / "buffer")
            started.wait_until(lambda: "does not answer" in started.said())
            # All that was scored is trained, more is sampled: it can do nothing but wait.
            started.wait_until(lambda: steps(run) == buffer.num_scored < buffer.num_sampled)
            stalled = steps(run)
        finally:
            teacher.start()
        assert started.codes(240) == [0], started.said()[-4000:]
        said = started.said()
    assert stalled < STEPS
    assert re.search(rf"teacher {teacher.url} does not answer for \d+ s \(.+\); waiting", said)
    assert f"teacher {teacher.url} answers again" in said
    assert steps_told(run)[STEPS]["teacher/away_sec"] > 0
    assert_same_run(whole, run)


def test_a_signal_in_an_evaluation_saves_the_step_and_the_evaluation_comes_after(
    config: Path, whole: Path
) -> None:
    run = config.parent / "signalled"
    with plain(1, *SIGNALLED, "4", "opd", str(config), f"run={run}") as started:
        assert started.codes(240) == [1]
        assert started.error() == (
            "error: stopped by SIGTERM; step 4 is saved; run the same command to go on."
        )
    assert newest(run) == steps(run) == 4
    assert not [of for of in records(run) if of["step"] == 4 and "eval/valid" in of]
    train(1, config, run)
    assert_same_run(whole, run)


def test_a_signal_ends_the_wait_for_a_teacher_that_never_came(tmp_path: Path) -> None:
    config, run = write_opd_config(tmp_path, f"http://127.0.0.1:{free_port()}"), tmp_path / "run"
    with plain(2, *opd_command(1, config, run)) as started:
        started.wait_until(lambda: "does not answer" in started.said())
        os.kill(started.pid(1), signal.SIGTERM)
        assert started.codes(120) == [1, 1], started.said()[-4000:]
        error = started.error()
        print(error)
        assert "Traceback" not in started.said()
    assert error.startswith("error: stopped by SIGTERM to rank 1; run the same command to go on")
    assert not (run / "checkpoints").exists() and not (run / "buffer").exists()


def test_another_teacher_at_the_address_is_refused(folder: Path, config: Path) -> None:
    run = folder / "exchanged"
    with ServerProcess("--dataset", str(folder / "data")) as other:
        address = f"teacher.url={other.url}"
        with plain(1, *opd_command(1, config, run, address)) as started:
            started.wait_until(lambda: steps(run) >= 1)
            other.kill()
            other.start("--weights", "second")
            assert started.codes(240) == [1]
            error = started.error()
        again = run_program(1, "opd", str(config), f"run={run}", address)
    assert error.startswith(
        f"error: {other.url} is another teacher than the one that this run began with"
    )
    assert f"step {newest(run)} is saved" in error and newest(run) < STEPS
    assert again.returncode == 1
    assert re.search(r"teacher  ([0-9a-f]{30,})\.\.\.  (?!\1)[0-9a-f]{30,}\.\.\.", again.stderr), (
        again.stderr
    )
    assert "Traceback" not in again.stderr


def test_two_processes_sample_and_train_like_one_and_stop_together(
    config: Path, whole: Path
) -> None:
    two, stopped = config.parent / "two", config.parent / "two-stopped"
    train(2, config, two, TWO_STEPS)
    got, expected = (RolloutReader.open_reader(run / "buffer") for run in (two, whole))
    for shard in (0, 1):  # both by the weights that the runs began with
        for one, other in zip(got.rollouts(shard), expected.rollouts(shard), strict=True):
            assert (one.prompt, one.sample) == (other.prompt, other.sample)
            assert np.array_equal(one.tokens_T, other.tokens_T)
            np.testing.assert_allclose(one.logprobs_S, other.logprobs_S, atol=1e-4)
    for name in ("loss/total", "loss/reverse_kl/total", "grad_norm", "opd/tokens"):
        assert steps_told(two)[1][name] == pytest.approx(steps_told(whole)[1][name], rel=SAME_STEP)

    command = opd_command(1, config, stopped, TWO_STEPS)
    with plain(2, *command) as started:
        started.wait_until(lambda: steps(stopped) >= 1)
        os.kill(started.pid(1), signal.SIGTERM)
        assert started.codes(120) == [1, 1]
        error = started.error()
    done = steps(stopped)
    assert error == (
        f"error: stopped by SIGTERM to rank 1; step {done} is saved; run the same command to go on."
    )
    assert newest(stopped) == done < 3
    train(2, config, stopped, TWO_STEPS)
    assert_same_run(two, stopped)
