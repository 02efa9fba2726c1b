"""The process that stores targets beside its maker: the same bytes, every error told, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.config import PROJECT_ROOT
from common.errors import AlignmentError, FormatError, ResumeError, VpmoeError
from datastore.manifest import load_dataset_manifest
from datastore.rollout_reader import RolloutReader
from tests.datastore.rollout_cases import (
    TEACHER,
    content,
    filled,
    held_out,
    open_buffer,
    shard_of,
    targets_for,
    targets_of,
)
from tests.datastore.waiting import wait_until

SOON_SEC = 60


def states(pid: int) -> set[str]:
    """Letters of the states of a process's threads, as in proc(5); none when it is gone."""
    found = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.add(stat.read_text().rpartition(")")[2].split()[0])
    return found


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    return not states(pid) <= set("ZX")


def test_it_writes_the_bytes_of_add_targets_while_its_maker_goes_on(tmp_path):
    filled(tmp_path / "at_once").close()
    with open_buffer(tmp_path / "beside") as buffer, ThreadPoolExecutor(1) as thread:
        encoder, stored = buffer.encoder(), []
        for number in range(3):
            buffer.append(shard_of(number))
            targets = targets_of(buffer, number)
            stored.append(thread.submit(encoder.add_targets, number, targets).result())
        for number, of_shard in enumerate(stored):
            assert of_shard.result(SOON_SEC) is None
            assert buffer.is_scored(number)
        assert buffer.num_scored == 3
    assert not is_running(encoder.pid)
    assert content(tmp_path / "beside") == content(tmp_path / "at_once")


def test_its_process_has_no_torch(tmp_path):
    with filled(tmp_path, shards=1) as buffer:
        buffer.append(shard_of(1))
        encoder = buffer.encoder()
        encoder.add_targets(1, targets_of(buffer, 1)).result(SOON_SEC)
        maps = Path(f"/proc/{encoder.pid}/maps").read_text()
        # The library, not the path: an engine that ran in this process may have preloaded a libgomp that torch brings.
        assert "arrow" in maps and "libtorch" not in maps


def test_closing_finishes_the_shard_in_hand(tmp_path):
    with open_buffer(tmp_path) as buffer:
        buffer.append(shard_of(0))
        stored = buffer.encoder()
        stored.pid  # noqa: B018 (it has started, so it takes the shard at once)
        stored.add_targets(0, targets_of(buffer, 0))
        wait_until(lambda: buffer.is_scored(0) or list(tmp_path.rglob("*.bin")), SOON_SEC)
    assert RolloutReader.open_reader(tmp_path).num_scored == 1
    filled(tmp_path / "at_once", shards=1).close()
    whole = content(tmp_path / "at_once")
    assert {n: v for n, v in content(tmp_path).items() if "at_once" not in n} == whole


def test_what_add_targets_raises_is_raised_and_the_next_shard_goes_on(tmp_path):
    with filled(tmp_path, shards=1) as buffer:
        for number in (1, 2, 3):
            buffer.append(shard_of(number))
        encoder = buffer.encoder()
        right = targets_of(buffer, 1)
        wrong = encoder.add_targets(1, right[:1])
        with pytest.raises(AlignmentError, match="targets of train shard 1; got 1; expected 6"):
            wrong.result(SOON_SEC)
        assert encoder.add_targets(1, right).result(SOON_SEC) is None
        assert encoder.add_targets(1, right[:1]).result(SOON_SEC) is None, "it has targets"
        targets = targets_of(buffer, 2), targets_of(buffer, 3)
        os.truncate(tmp_path / "train/shard-00002.arrow", 1000)
        with pytest.raises(FormatError, match=r"shard-00002\.arrow.*wrong size"):
            encoder.add_targets(2, targets[0]).result(SOON_SEC)
        assert encoder.add_targets(3, targets[1]).result(SOON_SEC) is None
        assert [buffer.is_scored(number) for number in range(4)] == [True, True, False, True]


def test_a_sealed_buffer_takes_none(tmp_path, handmade):
    prompts = tmp_path / "prompts"
    handmade.three_a_row(prompts, 512)
    with filled(tmp_path / "b", shards=2) as buffer:
        manifest = load_dataset_manifest(prompts)
        buffer.seal(TEACHER, manifest, held_out(), targets_for(held_out()))
        with pytest.raises(ResumeError, match="sealed"):
            buffer.encoder().add_targets(2, []).result(SOON_SEC)


def test_its_death_is_told_and_the_buffer_can_be_taken_up_again(tmp_path):
    with open_buffer(tmp_path) as buffer:
        buffer.append(shard_of(0))
        encoder, targets = buffer.encoder(), targets_of(buffer, 0)
        os.kill(encoder.pid, signal.SIGTERM)  # torchrun sends it to the whole group
        encoder.add_targets(0, targets).result(SOON_SEC)
        os.kill(encoder.pid, signal.SIGKILL)
        wait_until(lambda: not is_running(encoder.pid), SOON_SEC)
        buffer.append(shard_of(1))
        for _ in range(2):
            stored = encoder.add_targets(1, targets_of(buffer, 1))
            with pytest.raises(VpmoeError, match=r"stores targets died.*same command again"):
                stored.result(SOON_SEC)
    with open_buffer(tmp_path) as buffer:
        buffer.encoder().add_targets(1, targets_of(buffer, 1)).result(SOON_SEC)
        assert buffer.num_scored == 2


_WRITER = """
import sys
from pathlib import Path
from tests.datastore.rollout_cases import open_buffer, shard_of, targets_of
buffer = open_buffer(Path(sys.argv[1]))
encoder = buffer.encoder()
for number in range(buffer.num_sampled, 1000):
    buffer.append(shard_of(number))
    encoder.add_targets(number, targets_of(buffer, number))
    print(encoder.pid, flush=True)
"""


def writer(folder: Path) -> subprocess.Popen[str]:
    """A process that fills a buffer without end, and tells the pid of its encoder after each shard."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    command = [sys.executable, "-c", _WRITER, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_maker_leaves_no_process_and_loses_nothing(tmp_path):
    for shards in (1, 3, 2):
        with writer(tmp_path / "killed") as started:
            pids = [int(started.stdout.readline()) for _ in range(shards)]
            started.kill()
        with open_buffer(tmp_path / "killed") as buffer:
            assert not is_running(pids[0]), "the lock is free only when it has ended"
            sampled = buffer.num_sampled
            for number in range(sampled):
                if not buffer.is_scored(number):
                    buffer.add_targets(number, targets_of(buffer, number))
    assert sampled >= 6
    filled(tmp_path / "whole", shards=sampled).close()
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.slow
def test_it_holds_the_lock_for_as_long_as_it_may_write(tmp_path):
    with writer(tmp_path) as started:
        pid = int(started.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        started.kill()
    try:
        with pytest.raises(ResumeError, match="being written by another process"):
            open_buffer(tmp_path)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not is_running(pid), SOON_SEC)
    open_buffer(tmp_path).close()
