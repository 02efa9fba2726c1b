"""A set of rows in bits gives back its members by number, whatever its size and density."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.row_set import RowSet


@given(
    size=st.integers(0, 2000), density=st.sampled_from([0, 0.01, 0.5, 0.99, 1]), seed=st.integers(0)
)
@settings(max_examples=100, deadline=None)
def test_members_by_number(size: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed % 2**63).random(size) < density
    rows, members = RowSet(mask), np.flatnonzero(mask)
    assert (rows.size, rows.num_rows) == (len(members), size)
    assert rows.mask().tolist() == mask.tolist()
    assert rows.select(np.arange(rows.size)).tolist() == members.tolist()
    assert rows.select(np.arange(rows.size)[::-1]).tolist() == members[::-1].tolist()
    others = rows.complement()
    assert others.select(np.arange(others.size)).tolist() == np.flatnonzero(~mask).tolist()


def test_members_across_long_gaps() -> None:
    mask = np.zeros(1_000_003, bool)
    members = [0, 511, 512, 99_999, 100_352, 1_000_002]
    mask[members] = True
    assert RowSet(mask).select(np.arange(6)).tolist() == members


@pytest.mark.parametrize("numbers", [[3], [-1], [0, 3]])
def test_a_number_outside_is_refused(numbers: list[int]) -> None:
    with pytest.raises(IndexError):
        RowSet(np.array([True, False, True, True])).select(np.array(numbers))


def test_the_hash_is_of_the_bits_and_tells_sets_apart() -> None:
    mask = np.zeros(11, bool)
    mask[[0, 7, 8]] = True
    assert RowSet(mask).sha256 == hashlib.sha256(bytes([0b10000001, 0b10000000])).hexdigest()
    hashes = {RowSet(np.arange(1000) % 7 == remainder).sha256 for remainder in range(7)}
    assert len(hashes) == 7
