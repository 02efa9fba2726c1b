"""Runs of two processes that lose a rank, hang, run out of rows, diverge or are told to end: one message, nothing lost.

Bounds are for a busy machine: what must happen within seconds is given two minutes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import stored
from tests.distributed.runs import PROGRAM, records, write_config
from tests.distributed.started import newest, plain, steps, torchrun

pytestmark = pytest.mark.slow
STEPS, EVERY, SOON_SEC = 9, 4, 120.0
FAULTY = (sys.executable, str(Path(__file__).with_name("faulty.py")))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps with checkpoints after 4, 8 and 9; ranks count as silent, and rows as stalled, after 6 s."""
    return write_config(
        tmp_path_factory.mktemp("watch"),
        steps=STEPS,
        checkpoint={"every": EVERY, "keep": 3},
        watch={"silent_sec": 6.0, "data_sec": 6.0, "stuck_sec": 600.0},
        eval={"every": 0, "rows": 4},
    )


@pytest.fixture(scope="module")
def endless(config: Path) -> Path:
    """The same without an end."""
    path = config.with_name("endless.yaml")
    path.write_text(config.read_text().replace(f"steps: {STEPS}", "steps: 1000000"))
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """A run of two processes that nothing stopped."""
    run = config.parent / "whole"
    with torchrun(2, PROGRAM, "kd", str(config), f"run={run}") as started:
        assert started.codes(300) == [0], started.said()
    return run


def _go_on(config: Path, run: Path, whole: Path) -> None:
    """The same command ends the run, and the run ends as if nothing had stopped it, bit by bit."""
    with torchrun(2, PROGRAM, "kd", str(config), f"run={run}") as started:
        assert started.codes(300) == [0], started.said()
    stored.assert_same_tensors(*(stored.newest(of / "checkpoints") for of in (whole, run)))
    assert _losses(run) == _losses(whole)


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(of["step"], of["loss/total"]) for of in records(run) if "loss/total" in of]


def test_a_killed_rank_ends_the_run_with_one_message_and_it_goes_on(endless: Path) -> None:
    run = endless.parent / "killed"
    command = (PROGRAM, "kd", str(endless), f"run={run}")
    with torchrun(2, *command) as started:
        started.wait_until(lambda: steps(run) > EVERY)
        pid = started.pid(1)
        os.kill(pid, signal.SIGKILL)
        assert started.codes(SOON_SEC) == [1]
        error = started.error()
    assert error.startswith(f"error: rank 1 (node 0, pid {pid}) died; step ")
    assert error.endswith(f"run the same command to go on from step {newest(run)}.")
    last = newest(run)

    with torchrun(2, *command) as started:
        started.wait_until(lambda: steps(run) > last + 1)
        os.kill(started.pid(1), signal.SIGTERM)
        assert started.codes(SOON_SEC) == [1]
        error = started.error()
        assert f"going on from step {last} of" in started.said()
    stopped = steps(run)
    assert error == (
        f"error: stopped by SIGTERM to rank 1; step {stopped} is saved; run the same command to go on."
    )
    assert newest(run) == stopped

    with torchrun(2, *command) as started:
        started.wait_until(lambda: steps(run) > stopped + 1)
        started.launched[0].terminate()
        assert started.codes(SOON_SEC) == [1]
        error = started.error()
        assert f"going on from step {stopped} of" in started.said()
    # torchrun tells one rank after the other: they may agree to stop in between.
    by = r"SIGTERM( to rank \d)?"
    assert re.match(rf"error: stopped by {by}; step {newest(run)} is saved", error)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_hangs_is_named_and_ends_quietly_when_it_wakes(
    endless: Path, lost: int
) -> None:
    run = endless.parent / f"hung-{lost}"
    with plain(2, PROGRAM, "kd", str(endless), f"run={run}") as started:
        started.wait_until(lambda: steps(run) > EVERY)
        hung, other = started.launched[lost], started.launched[1 - lost]
        hung.send_signal(signal.SIGSTOP)
        assert other.wait(SOON_SEC) == 1
        error = started.error()
        hung.send_signal(signal.SIGCONT)
        assert started.codes(SOON_SEC) == [1, 1]
        assert started.errors() == [error]
    who = f"rank 1 (node 0, pid {hung.pid}) has not been heard for" if lost else "rank 0, through"
    assert error.startswith(f"error: {who}")
    assert error.endswith(f"run the same command to go on from step {newest(run)}.")


def test_the_death_of_the_rank_that_holds_the_store_is_told_by_the_other(endless: Path) -> None:
    run = endless.parent / "headless"
    with plain(2, PROGRAM, "kd", str(endless), f"run={run}") as started:
        started.wait_until(lambda: steps(run) > 0)
        started.launched[0].kill()
        assert started.codes(SOON_SEC) == [-signal.SIGKILL, 1]
        error = started.error()
    assert error.startswith(f"error: rank 0 (node 0, pid {started.launched[0].pid}) died; step ")


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_that_do_not_come_stop_every_rank_and_cost_no_step(
    config: Path, whole: Path, rank: int
) -> None:
    """Two rows a step: the 13th on a rank is of step 7, the 11th of step 6."""
    run, nth, step = config.parent / f"stalled-{rank}", (13, 11)[rank], (7, 6)[rank]
    fault = ("stall", "train", str(rank), str(nth))
    with torchrun(2, *FAULTY, *fault, "kd", str(config), f"run={run}") as started:
        assert started.codes(300) == [1]
        error = started.error()
        assert "Traceback" not in started.said().partition(error)[0]
    assert re.fullmatch(
        rf"error: rank {rank} has waited 6 s for train row \d+ \(row \d+ of train/shard-0000[01]\.arrow\) "
        rf"of step {step}; step {step - 1} is saved; mend that, then run the same command to go on\.",
        error,
    )
    assert newest(run) == step - 1
    _go_on(config, run, whole)


def test_a_damaged_file_stops_every_rank_and_costs_no_step(config: Path, whole: Path) -> None:
    run, folder = config.parent / "damaged", config.parent / "copy"
    shutil.copytree(config.parent / "data", folder)
    command = (PROGRAM, "kd", str(config), f"run={run}", f"dataset={folder}")
    shards = sorted((folder / "train").glob("*.arrow"))
    with torchrun(2, *command) as started:
        started.wait_until(lambda: steps(run) > 0)
        for shard in shards:
            shard.with_suffix(".new").write_bytes(b"no shard")
            shard.with_suffix(".new").replace(shard)
        assert started.codes(300) == [1]
        error = started.error()
    assert re.match(r"error: rank [01] cannot read train row \d+ \(row \d+ of train/shard", error)
    assert "has the wrong size" in error and f"step {newest(run)} is saved" in error
    _go_on(config, run, whole)


def test_a_nan_on_one_rank_stops_all_and_costs_no_step(config: Path, whole: Path) -> None:
    run = config.parent / "nan"
    fault = ("nan", "train", "1", "12")
    with torchrun(2, *FAULTY, *fault, "kd", str(config), f"run={run}") as started:
        assert started.codes(300) == [1]
        error = started.error()
    assert "got loss nan, gradient norm nan: on rank 1 the sum of kd of " in error
    assert "; step 5 is saved; the same command would meet the same batch" in error
    assert f"init_from.run={run} optimizer.lr=LOWER" in error
    assert newest(run) == 5 and steps(run) == 5
    _go_on(config, run, whole)


def test_a_rate_too_high_is_told_with_the_way_out_and_comes_again(config: Path) -> None:
    run = config.parent / "diverged"
    command = (PROGRAM, "kd", str(config), f"run={run}", "optimizer.lr=1.0e+35")
    for _ in range(2):
        with torchrun(2, *command) as started:
            assert started.codes(300) == [1]
            error = started.error()
        assert "on rank 0 the sum of ce of reasoning; step 1 is saved; the same command" in error
        assert newest(run) == 1


def test_an_error_that_nobody_foresaw_is_told_by_one_rank(config: Path) -> None:
    """The rate overflows a float inside of the optimizer of every rank."""
    run = config.parent / "unforeseen"
    with torchrun(2, PROGRAM, "kd", str(config), f"run={run}", "optimizer.lr=3.0e+38") as started:
        assert started.codes(300) == [1]
        said = started.said()
    assert said.count("RuntimeError: value cannot be converted to type float") == 1
    assert not (run / "checkpoints" / "latest").exists()


def test_a_run_that_stands_still_tells_where_each_rank_is(config: Path) -> None:
    """Rank 1 never gets its rows of the evaluation, which no reader thread reads; both beat all the while."""
    run = config.parent / "stuck"
    fault = ("stall", "valid", "1", "1")
    changes = ("eval.every=1", "watch.stuck_sec=12")
    with torchrun(2, *FAULTY, *fault, "kd", str(config), f"run={run}", *changes) as started:
        assert started.codes(300) == [1]
        error = started.error()
        said = started.said()
    assert error.startswith("error: nothing was finished for 1")
    assert "every rank: evaluation at step 0 for" in error
    assert "no checkpoint is complete yet" in error
    for rank in (0, 1):
        assert f"rank {rank} stands here:" in said, said
    assert "faulty.py" in said and "in evaluate" in said, said


def test_one_process_ends_at_a_signal_and_at_once_at_the_second(endless: Path) -> None:
    run = endless.parent / "alone"
    fault = ("stall", "valid", "0", "1")
    with plain(1, *FAULTY, *fault, "kd", str(endless), f"run={run}", "eval.every=1") as started:
        started.wait_until(lambda: (run / "config.yaml").exists())
        started.launched[0].send_signal(signal.SIGINT)
        time.sleep(5)
        assert started.launched[0].poll() is None
        # Signals seen together count as one, and a busy process may see these late: ask again, as a person does.
        for _ in range(int(SOON_SEC / 5)):
            started.launched[0].send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                started.codes(5)
                break
        assert started.codes(5) == [1]
        error = started.error()
    assert error.startswith("error: a second signal asked for the end at once; step 0 was the last")
    with plain(1, PROGRAM, "kd", str(endless), f"run={run}") as started:
        started.wait_until(lambda: steps(run) > 0)
        started.launched[0].send_signal(signal.SIGUSR1)
        assert started.codes(SOON_SEC) == [1]
        assert started.errors() == [
            f"error: stopped by SIGUSR1; step {steps(run)} is saved; run the same command to go on."
        ]


def test_a_machine_that_stands_still_blames_nobody_and_tells_a_later_fault(config: Path) -> None:
    """All processes, the store too, are stopped for longer than a rank may be silent; later rank 1 gets no rows."""
    run = config.parent / "suspended"
    changes = ("eval.every=1", "watch.stuck_sec=12")
    fault = ("stall", "valid", "1", "1")
    with torchrun(2, *FAULTY, *fault, "kd", str(config), f"run={run}", *changes) as started:
        started.wait_until(lambda: (run / "config.yaml").exists())
        time.sleep(3)
        pids = started.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(9)
        assert not started.errors()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert started.codes(300) == [1]
        error = started.error()
    assert error.startswith("error: nothing was finished for 1")
