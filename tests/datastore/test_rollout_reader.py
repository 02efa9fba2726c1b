"""Rows of a scored shard in parts: together the whole, and each reads nothing of the others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import FormatError
from datastore.rollout_reader import RolloutReader
from datastore.shard import TargetShard
from tests.datastore.conftest import flip_bit
from tests.datastore.rollout_cases import open_buffer, shard_of, targets_of


def plain(value: object) -> Iterator[object]:
    """The leaves of a record in order; arrays as their dtype and bytes."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, np.ndarray):
        yield value.dtype, value.tobytes()
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from plain(inner)
    else:
        yield value


@pytest.fixture
def reader(tmp_path: Path) -> RolloutReader:
    """One scored shard of at least five rows."""
    with open_buffer(tmp_path, seq_len=140) as buffer:
        buffer.append(shard_of(0) + shard_of(1))
        buffer.add_targets(0, targets_of(buffer, 0))
    found = RolloutReader.open_reader(tmp_path)
    assert found.counts(0).rows >= 5
    return found


def test_rows_in_parts_are_the_whole(reader):
    count = reader.counts(0).rows
    whole = [list(plain(row)) for row in reader.rows(0)]
    assert len(whole) == count
    for cuts in ([0, count], [0, 1, count], [0, 2, 2, count - 1, count], [*range(count + 1)]):
        parts = [reader.rows(0, range(*ends)) for ends in itertools.pairwise(cuts)]
        assert [len(part) for part in parts] == np.diff(cuts).tolist()
        assert [list(plain(row)) for part in parts for row in part] == whole


def test_a_row_that_is_not_there_is_refused(reader):
    count = reader.counts(0).rows
    with pytest.raises(IndexError):
        reader.rows(0, range(count - 1, count + 1))


def test_a_part_does_not_read_the_other_rows(reader):
    record = reader.scored_record("train", 0)
    blobs = TargetShard(
        reader.place.targets, record.entry, target_id=record.target_id, split="train", shard=0
    )
    blob = blobs.blob(0, reader.rows(0, range(1))[0].row.row_hash)
    flip_bit(blobs.path, 8 * blobs.path.read_bytes().index(blob))
    for damaged in (None, range(1), range(0, 3)):
        with pytest.raises(FormatError, match="row 0"):
            reader.rows(0, damaged)
    assert len(reader.rows(0, range(1, reader.counts(0).rows))) == reader.counts(0).rows - 1
