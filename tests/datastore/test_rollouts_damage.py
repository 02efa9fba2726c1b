"""Damage to a rollout buffer: every flipped bit, every cut, and a writer killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.config import PROJECT_ROOT
from common.errors import AlignmentError, FormatError
from datastore.manifest import read_self_hashed
from datastore.rollout_records import SampledRecord
from datastore.rollout_shard import (
    LogprobShard,
    RolloutShard,
    StoredRollout,
    write_logprob_shard,
    write_rollout_shard,
)
from datastore.rollouts import RolloutBuffer
from tests.datastore.rollout_cases import content, filled, open_buffer, shard_of, targets_of
from tests.datastore.test_rollouts import values
from tests.datastore.test_shard import data_bits, outcomes_of_flips

PLACE = {"dataset_id": "ab" * 32, "split": "train", "shard": 3}
TARGETS = {"target_id": "cd" * 32, "split": "train", "shard": 3}


def stored(number: int) -> StoredRollout:
    """A rollout of a few numbers, all different."""
    rng = np.random.default_rng(number)
    return StoredRollout(
        row=number,
        document=1 + number,
        prompt_id=rng.bytes(16),
        prompt=10**12 + number,
        sample=2,
        policy_version=10**10,
        reasoning="medium",
        verdict="cut_final",
        prompt_tokens=3,
        reasoning_tokens=2,
        final_tokens=number,
        logprobs_S=rng.normal(size=2 + number).astype(np.float32),
        row_hash=2**63 + number,
    )


ROLLOUTS = [stored(number) for number in range(3)]
LOGPROBS = [(2**63 + n, np.arange(n + 1, dtype=np.float32)) for n in range(3)]


def rollout_file(folder: Path):
    """Writes the rollouts; (path, entry -> what is read of them, what was written)."""
    entry = write_rollout_shard(folder, ROLLOUTS, **PLACE)

    def read(entry=entry) -> list:
        shard = RolloutShard(folder, entry, **PLACE)
        return [values(shard.rollout(index)[0]) for index in range(shard.num_rows)]

    return entry, read, [values(one) for one in ROLLOUTS]


def logprob_file(folder: Path):
    """The same of exact logprobs."""
    entry = write_logprob_shard(folder, LOGPROBS, **TARGETS)

    def read(entry=entry) -> list:
        shard = LogprobShard(folder, entry, **TARGETS)
        return [shard.logprobs(index, of).tolist() for index, (of, _) in enumerate(LOGPROBS)]

    return entry, read, [logprobs_S.tolist() for _, logprobs_S in LOGPROBS]


FILES = pytest.mark.parametrize("make", [rollout_file, logprob_file])


@FILES
def test_every_flipped_bit_of_the_data_is_refused(tmp_path, handmade, make):
    entry, read, expected = make(tmp_path)
    assert read() == expected
    path = tmp_path / entry.name
    bits = data_bits(path)
    assert len(bits) > 8 * 3 * 8
    for bit in bits:
        handmade.flip_bit(path, bit)
        with pytest.raises(FormatError, match=r"shard-00003\.arrow.*; restore the file"):
            read()
        handmade.flip_bit(path, bit)


@pytest.mark.slow
@FILES
def test_no_flipped_bit_gives_other_values(tmp_path, handmade, make):
    entry, read, expected = make(tmp_path)
    outcomes = outcomes_of_flips(handmade.flip_bit, tmp_path / entry.name, read, expected)
    # Bits that carry no data (the schema's first copy, Arrow's padding) are caught by the file's sha256 alone.
    assert outcomes["refused"] > outcomes["same"]


@FILES
def test_every_truncation_is_refused(tmp_path, make):
    entry, read, _ = make(tmp_path)
    for size in reversed(range(entry.bytes)):
        os.truncate(tmp_path / entry.name, size)
        with pytest.raises(FormatError, match="wrong size"):
            read()
        with pytest.raises(FormatError, match="not a readable Arrow file"):
            read(entry.model_copy(update={"bytes": size}))


@FILES
def test_a_shard_at_another_place_is_refused(tmp_path, make):
    entry, read, _ = make(tmp_path)
    assert read()
    cls, place = (RolloutShard, PLACE) if make is rollout_file else (LogprobShard, TARGETS)
    identity = next(iter(place))
    for change in ({identity: "ef" * 32}, {"split": "valid"}, {"shard": 4}):
        with pytest.raises(FormatError, match="is another shard"):
            cls(tmp_path, entry, **(place | change))


def test_logprobs_of_another_rollout_are_refused(tmp_path):
    entry = write_logprob_shard(tmp_path, LOGPROBS, **TARGETS)
    shard = LogprobShard(tmp_path, entry, **TARGETS)
    with pytest.raises(AlignmentError, match="another rollout"):
        shard.logprobs(0, LOGPROBS[1][0])
    with pytest.raises(IndexError):
        shard.logprobs(3, 0)


def test_every_flipped_bit_and_cut_of_a_record_is_refused(tmp_path, handmade):
    buffer = filled(tmp_path, shards=1)
    buffer.close()
    path = buffer.place.sampled("train", 0)
    whole = read_self_hashed(SampledRecord, path)
    size = path.stat().st_size
    for bit in range(size * 8):
        handmade.flip_bit(path, bit)
        with contextlib.suppress(FormatError):
            # A flip may turn white space into other white space: then the values are the same.
            assert read_self_hashed(SampledRecord, path) == whole
        handmade.flip_bit(path, bit)
    text = path.read_bytes()
    for end in range(len(text.rstrip())):
        path.write_bytes(text[:end])
        with pytest.raises(FormatError):
            read_self_hashed(SampledRecord, path)


def test_an_edited_record_is_refused(tmp_path):
    with filled(tmp_path, shards=1) as buffer:
        path = buffer.place.sampled("train", 0)
        values_ = json.loads(path.read_bytes())
        values_["counts"]["reasoning"] += 1
        path.write_text(json.dumps(values_))
        with pytest.raises(FormatError, match="does not match its own hash"):
            buffer.counts(0)


def test_shards_that_were_exchanged_are_refused(tmp_path):
    buffer = filled(tmp_path, shards=2)
    buffer.close()
    for one, other in (
        (buffer.place.sampled("train", 0), buffer.place.sampled("train", 1)),
        (buffer.place.scored("train", 0), buffer.place.scored("train", 1)),
    ):
        contents = one.read_bytes(), other.read_bytes()
        other.write_bytes(contents[0])
        reader = RolloutBuffer.open_reader(tmp_path)
        with pytest.raises(FormatError, match="of another shard or buffer"):
            reader.rows(1)
        other.write_bytes(contents[1])
    # The targets and logprobs of shard 0 in the place of those of shard 1, with all their hashes right.
    for folder in ("rollouts/train", "targets/tiny/train", "targets/tiny/logprobs/train"):
        path = tmp_path / folder / "shard-00001.arrow"
        was = path.read_bytes()
        path.write_bytes((tmp_path / folder / "shard-00000.arrow").read_bytes())
        with pytest.raises(FormatError, match=r"shard-00001\.arrow"):
            RolloutBuffer.open_reader(tmp_path).rows(1)
        path.write_bytes(was)
    assert RolloutBuffer.open_reader(tmp_path).rows(1)


# Two shards, the targets of each after the next one is sampled, as a run with a lag does it; killed just before its
# n-th commit, for every n, and each time finished by a second process.
_KILL_AT_EVERY_COMMIT = """
import os, signal, sys
from pathlib import Path
from common import tokenizer
from tests.datastore.killed import run_killed
from tests.datastore.rollout_cases import open_buffer, shard_of, targets_of

os.fsync = lambda fd: None  # a killed process loses nothing that it wrote; only a power cut would
SHARDS = 2

def fill(folder):
    buffer = open_buffer(folder)
    while buffer.num_scored < SHARDS:
        if buffer.num_sampled < min(SHARDS, buffer.num_scored + 2):
            buffer.append(shard_of(buffer.num_sampled))
        else:
            buffer.add_targets(buffer.num_scored, targets_of(buffer, buffer.num_scored))

def run(folder, kill_at):
    return run_killed(lambda: fill(folder), kill_at)

kill_at = 0
while True:
    kill_at += 1
    folder = Path(sys.argv[1]) / str(kill_at)
    if (status := run(folder, kill_at)) == 0:
        break
    assert status == -signal.SIGKILL
    assert run(folder, None) == 0
"""


@pytest.mark.slow
def test_killed_before_any_commit_a_second_run_ends_at_the_same_bytes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    command = [sys.executable, "-c", _KILL_AT_EVERY_COMMIT, str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True, timeout=250)
    results = sorted((tmp_path / "out").iterdir(), key=lambda path: int(path.name))
    whole = content(results.pop())
    # buffer.json; two files and a record of each shard, and again of its targets; the order of ids.
    assert len(results) == 1 + 2 * (3 + 3) + 1
    for folder in results:
        assert content(folder) == whole, folder.name


_WRITE_WITHOUT_END = """
import sys
from tests.datastore.rollout_cases import open_buffer, shard_of, targets_of
buffer = open_buffer(sys.argv[1])
print("open", flush=True)
while True:
    buffer.append(shard_of(buffer.num_sampled))
    buffer.add_targets(buffer.num_scored, targets_of(buffer, buffer.num_scored))
    print(buffer.num_scored, flush=True)
"""


@pytest.mark.parametrize("delay_ms", [0, 3, 11, 29])
def test_killed_at_any_moment_no_finished_shard_is_lost(tmp_path, delay_ms):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    command = [sys.executable, "-c", _WRITE_WITHOUT_END, str(tmp_path / "killed")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as writer:
        while (line := writer.stdout.readline()) != "2\n":
            assert line
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(delay_ms / 1000)
        writer.send_signal(signal.SIGKILL)
        finished = [2, *map(int, writer.stdout.read().split())]
    with open_buffer(tmp_path / "killed") as buffer:
        scored, sampled = buffer.num_scored, buffer.num_sampled
        assert finished[-1] <= scored <= sampled <= finished[-1] + 1
        if scored < sampled:
            buffer.add_targets(scored, targets_of(buffer, scored))
    with open_buffer(tmp_path / "whole") as buffer:
        for number in range(sampled):
            buffer.append(shard_of(number))
            buffer.add_targets(number, targets_of(buffer, number))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
