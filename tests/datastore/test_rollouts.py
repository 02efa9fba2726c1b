"""The rollout buffer: what goes in comes out, bit by bit, and nothing foreign goes in."""

from __future__ import annotations

import collections
import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import PROJECT_ROOT
from common.errors import AlignmentError, FormatError, ResumeError, VpmoeError
from common.tokenizer import PAD
from datastore.rollout import Rollout
from datastore.rollouts import RolloutBuffer
from tests.datastore.rollout_cases import (
    IDENTITY,
    SEQ_LEN,
    content,
    filled,
    open_buffer,
    rollout,
    shard_of,
    targets_for,
    targets_of,
)


def values(one: Rollout) -> dict:
    """A rollout as plain values: arrays as bytes with their dtypes."""
    found = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    return {
        name: (value.dtype, value.tobytes()) if isinstance(value, np.ndarray) else value
        for name, value in found.items()
    }


FORMS = st.fixed_dictionaries(
    {},
    optional={
        "keep": st.integers(1, 28),
        "break_at": st.integers(0, 20),
        "version": st.integers(0, 2**40),
    },
)
SHARDS = st.lists(
    st.dictionaries(
        st.tuples(st.integers(0, 2**20), st.integers(0, 3)), FORMS, min_size=1, max_size=9
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=15, deadline=None)
@given(SHARDS, st.sampled_from([140, 256, 700]))
def test_what_is_appended_is_read_again(shards, seq_len):
    made = [
        [rollout(number, sample=sample, **form) for (number, sample), form in shard.items()]
        for shard in shards
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        open_buffer(Path(folder) / "b", seq_len=seq_len) as buffer,
    ):
        for number, rollouts in enumerate(made):
            assert buffer.append(rollouts) == number
            targets = targets_for(rollouts)
            buffer.add_targets(number, targets)
        assert (buffer.num_sampled, buffer.num_scored) == (len(made), len(made))
        for number, rollouts in enumerate(made):
            found = buffer.rollouts(number)
            assert [values(one) for one in found] == [values(one) for one in rollouts]
            assert_counts(buffer, number, rollouts)
            assert_rows(buffer, number, rollouts)


def assert_counts(buffer: RolloutBuffer, shard: int, rollouts: list[Rollout]) -> None:
    counts = buffer.counts(shard)
    spans = [span for one in rollouts for span in one.spans_T.tolist()]
    assert counts.rollouts == len(rollouts)
    assert (counts.reasoning, counts.final) == (spans.count(1), spans.count(2))
    assert counts.tokens == sum(len(one.logprobs_S) for one in rollouts)
    assert counts.verdicts == collections.Counter(one.verdict for one in rollouts)
    assert counts.modes == collections.Counter(one.reasoning for one in rollouts)
    versions = [one.policy_version for one in rollouts]
    assert (counts.first_version, counts.last_version) == (min(versions), max(versions))


def assert_rows(buffer: RolloutBuffer, shard: int, rollouts: list[Rollout]) -> None:
    """Every rollout stands once in the rows, with its targets and both its logprobs."""
    wanted = {}
    for one, target in zip(rollouts, targets_for(rollouts), strict=True):
        wanted[one.tokens_T.tobytes(), one.logprobs_S.tobytes()] = one, target
    rows, seen = buffer.rows(shard), 0
    assert len(rows) == buffer.counts(shard).rows
    for scored in rows:
        for where, document, sampled in zip(
            scored.row.documents(), scored.documents, scored.sampled, strict=True
        ):
            tokens_T = scored.row.tokens_T[where]
            assert tokens_T[-1] == PAD and scored.row.spans_T[where][-1] == 0
            one, target = wanted[tokens_T[:-1].tobytes(), sampled.sampling_logprob_S.tobytes()]
            assert scored.row.spans_T[where][:-1].tobytes() == one.spans_T.tobytes()
            exact = target.realised_logprob_P
            assert sampled.teacher_logprob_S.tobytes() == exact.tobytes()
            assert np.abs(document.target.realised_logprob_P - exact).max() <= 3 / 64
            assert np.array_equal(document.target.positions_P, target.positions_P)
            assert np.array_equal(document.target.num_head_P, target.num_head_P)
            seen += 1
    assert seen == len(rollouts)


def test_the_same_rollouts_give_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        filled(tmp_path / name, shards=2).close()
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_targets_may_come_in_any_order_and_only_their_prefix_counts(tmp_path):
    with open_buffer(tmp_path) as buffer:
        for number in range(3):
            buffer.append(shard_of(number))
        for added, scored in ((2, 0), (0, 1), (1, 3)):
            buffer.add_targets(added, targets_of(buffer, added))
            assert buffer.num_scored == scored
    with filled(tmp_path / "in_order") as other:
        assert content(tmp_path / "in_order") == {
            name: value for name, value in content(tmp_path).items() if "in_order" not in name
        }
        other.add_targets(1, [])  # it has targets: nothing to do


def test_another_opening_goes_on_behind_the_last_shard(tmp_path):
    filled(tmp_path, shards=2).close()
    before = content(tmp_path)
    with open_buffer(tmp_path) as buffer:
        assert (buffer.num_sampled, buffer.num_scored) == (2, 2)
        assert content(tmp_path) == before
        assert buffer.append(shard_of(2)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs_S": np.zeros(3, np.float32)}, "span on sampled"),
        ({"logprobs_S": np.zeros(28, np.float64)}, "dtypes"),
        ({"logprobs_S": np.full(28, np.nan, np.float32)}, "finite, at most 0"),
        ({"logprobs_S": np.full(28, 0.1, np.float32)}, "finite, at most 0"),
        ({"verdict": "cut_final"}, "verdict"),
        ({"reasoning": "none"}, "low, medium, high"),
        ({"doc_id": b"short"}, "16 bytes"),
        ({"policy_version": -1}, "numbers from 0"),
    ],
)
def test_what_is_no_rollout_is_refused(tmp_path, change, message):
    bad = dataclasses.replace(rollout(1), **change)
    with open_buffer(tmp_path) as buffer:
        with pytest.raises(FormatError, match=f"rollout 1.*{message}"):
            buffer.append([rollout(0), bad])
        assert buffer.num_sampled == 0
        assert not list(tmp_path.rglob("*.arrow"))


def test_a_wrong_span_is_refused(tmp_path):
    good = rollout(0)
    spans_T = good.spans_T.copy()
    spans_T[-1] = 1
    with (
        open_buffer(tmp_path) as buffer,
        pytest.raises(FormatError, match="span of sampled token 27"),
    ):
        buffer.append([dataclasses.replace(good, spans_T=spans_T)])


def test_rollouts_with_one_identity_none_and_too_long_ones_are_refused(tmp_path):
    with open_buffer(tmp_path, seq_len=137) as buffer:
        for rollouts, message in (
            ([rollout(0), rollout(0)], "2, 1 of them distinct"),
            ([], "at least one"),
        ):
            with pytest.raises(FormatError, match=message):
                buffer.append(rollouts)
        buffer.append([rollout(0)])
    with open_buffer(tmp_path / "short", seq_len=136) as buffer:
        with pytest.raises(FormatError, match="does not fit a row"):
            buffer.append([rollout(0)])
        assert buffer.num_sampled == 0


def test_targets_of_other_tokens_are_refused(tmp_path):
    with open_buffer(tmp_path) as buffer:
        # Two valid rollouts of the same lengths, so that only the tokens tell their targets apart.
        pair = [rollout(1), rollout(2)]
        assert len({len(one.tokens_T) for one in pair}) == 1
        buffer.append(pair)
        right = targets_of(buffer, 0)
        wrong = [
            (right[::-1], "not those of its tokens"),
            (right[:1], "targets of train shard 0"),
            ([right[0], targets_for([rollout(1, keep=20)])[0]], "other positions"),
        ]
        for targets, message in wrong:
            with pytest.raises(AlignmentError, match=message):
                buffer.add_targets(0, targets)
        other = [dataclasses.replace(target, threshold=1 / 20) for target in right]
        with pytest.raises(FormatError, match="threshold"):
            buffer.add_targets(0, other)
        with pytest.raises(FormatError, match="entropies"):
            buffer.add_targets(0, [dataclasses.replace(t, entropy_P=None) for t in right])
        assert buffer.num_scored == 0
        buffer.add_targets(0, right)
        assert buffer.num_scored == 1


def test_a_shard_that_is_not_there_is_told(tmp_path):
    with open_buffer(tmp_path) as buffer:
        with pytest.raises(FormatError, match=r"shard-00000\.json is missing"):
            buffer.add_targets(0, [])
        buffer.append(shard_of(0))
        with pytest.raises(FormatError, match=r"logprobs.*shard-00000\.json is missing"):
            buffer.rows(0)


def test_another_identity_is_refused_with_a_table(tmp_path):
    filled(tmp_path, shards=1).close()
    before = content(tmp_path)
    other = IDENTITY | {"sampling": {"slots": 8}, "teacher": "ef" * 32}
    with pytest.raises(ResumeError) as told:
        open_buffer(tmp_path, identity=other, seq_len=512)
    lines = [line.split() for line in str(told.value).splitlines()]
    assert ["identity.sampling.slots", "4", "8"] in lines
    assert ["identity.teacher", "null", "ef" * 18 + "e..."] in lines
    assert ["seq_len", str(SEQ_LEN), "512"] in lines
    with pytest.raises(ResumeError, match="slug"):
        open_buffer(tmp_path, slug="other")
    assert content(tmp_path) == before


def test_a_dataset_is_no_buffer(tmp_path, handmade):
    handmade.three_a_row(tmp_path, 512)
    with pytest.raises(ResumeError, match=r"manifest\.json and is no buffer"):
        open_buffer(tmp_path)
    with pytest.raises(FormatError, match=r"buffer\.json is missing"):
        RolloutBuffer.open_reader(tmp_path)


def test_a_buffer_has_one_writer(tmp_path):
    with open_buffer(tmp_path), pytest.raises(ResumeError, match="another process"):
        open_buffer(tmp_path)
    open_buffer(tmp_path).close()


_READER = """
import sys
from datastore.rollouts import RolloutBuffer
reader = RolloutBuffer.open_reader(sys.argv[1])
for line in sys.stdin:
    rows = [len(reader.rows(shard)) for shard in range(reader.num_scored)]
    print(reader.num_sampled, reader.num_scored, sum(rows), flush=True)
"""


def test_a_reader_in_another_process_sees_shards_as_they_come(tmp_path):
    with open_buffer(tmp_path) as buffer:
        command = [sys.executable, "-c", _READER, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as reader:

            def seen() -> list[int]:
                reader.stdin.write("look\n")
                reader.stdin.flush()
                return [int(word) for word in reader.stdout.readline().split()]

            assert seen() == [0, 0, 0]
            rows = 0
            for number in range(2):
                buffer.append(shard_of(number))
                assert seen() == [number + 1, number, rows]
                buffer.add_targets(number, targets_of(buffer, number))
                rows += buffer.counts(number).rows
                assert seen() == [number + 1, number + 1, rows]
            reader.stdin.close()
            assert reader.wait() == 0


@pytest.mark.parametrize("rename", range(1, 4))
@pytest.mark.parametrize("step", ["append", "add_targets"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, step, rename):
    filled(tmp_path / "whole", shards=2).close()
    real, calls = os.replace, 0

    def full(*names: object) -> None:
        nonlocal calls
        calls += 1
        if calls == rename:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*names)

    with filled(tmp_path / "full", shards=1) as buffer:
        if step == "add_targets":
            buffer.append(shard_of(1))
            targets = targets_of(buffer, 1)
        before = content(tmp_path / "full")
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full)
            with pytest.raises(VpmoeError, match=r"disk that holds .* is full.*free space"):
                buffer.append(shard_of(1)) if step == "append" else buffer.add_targets(1, targets)
        assert (buffer.num_sampled, buffer.num_scored) == (1 + (step != "append"), 1)
        assert before.items() <= content(tmp_path / "full").items()
        if step == "append":
            buffer.append(shard_of(1))
        buffer.add_targets(1, targets_of(buffer, 1))
    assert content(tmp_path / "full") == content(tmp_path / "whole")


def test_what_a_killed_writer_left_is_swept(tmp_path):
    filled(tmp_path, shards=2).close()
    before = content(tmp_path)
    for folder in ("train", "rollouts/train", "targets/tiny/train", "targets/tiny/logprobs/train"):
        shutil.copy(tmp_path / "train/shard-00000.arrow", tmp_path / folder / "shard-00002.arrow")
        (tmp_path / folder / ".tmp-abc-shard-00003.arrow").write_bytes(b"half")
    (tmp_path / "targets/tiny/.tmp-abc-id_order.bin").write_bytes(b"half")
    open_buffer(tmp_path).close()
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "train/shard-00000.arrow",
        "rollouts/train/shard-00001.arrow",
        "targets/tiny/train/shard-00000.arrow",
        "targets/tiny/logprobs/train/shard-00001.arrow",
        "rollouts/train/shard-00000.json",
        "rollouts/train/shard-00001.json",
    ],
)
def test_a_lost_or_short_file_of_a_finished_shard_is_told_and_nothing_is_swept(tmp_path, name):
    filled(tmp_path, shards=2).close()
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-4])
    before = content(tmp_path)
    with pytest.raises(FormatError, match=path.name):
        open_buffer(tmp_path)
    assert content(tmp_path) == before
    path.unlink()
    with pytest.raises(FormatError, match="shard"):
        open_buffer(tmp_path)
