"""The order is a bijection for every size, keyed by seed and epoch, and never drifts."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from datastore.order import feistel_permutation

GOLDEN = Path(__file__).parent / "golden" / "order.txt"
POWERS = sorted({2**k + d for k in range(1, 19) for d in (-1, 0, 1)} - {0})
KEYS = st.integers(0, 2**64 - 1)


def order(n: int, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return feistel_permutation(np.arange(n), n, seed=seed, epoch=epoch)


def is_bijection(values: np.ndarray) -> bool:
    return bool((np.bincount(values, minlength=values.size) == 1).all())


@pytest.mark.parametrize("seed, epoch", [(0, 0), (2**64 - 1, 3)])
def test_bijection_for_every_small_size(seed: int, epoch: int) -> None:
    failed = [n for n in range(1, 601) if not is_bijection(order(n, seed=seed, epoch=epoch))]
    assert failed == []


@pytest.mark.parametrize("n", POWERS)
def test_bijection_around_powers_of_two(n: int) -> None:
    assert is_bijection(order(n, seed=7, epoch=1))


def test_golden_vectors_made_by_another_program() -> None:
    lines = [x for x in GOLDEN.read_text().splitlines() if not x.startswith("#")]
    assert len(lines) == 96
    for line in lines:
        key, values = line.split(":")
        seed, epoch, n = map(int, key.split())
        indices = [*range(min(n, 10)), *([n - 1] if n >= 600 else [])]
        found = feistel_permutation(np.array(indices), n, seed=seed, epoch=epoch)
        assert found.tolist() == [int(value) for value in values.split()], key


@given(n=st.integers(1, 2**62), seed=KEYS, epoch=KEYS, data=st.data())
@settings(max_examples=200, deadline=None)
def test_an_index_does_not_depend_on_its_neighbours(n, seed, epoch, data) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = feistel_permutation(indices, n, seed=seed, epoch=epoch)
    alone = [int(feistel_permutation(i, n, seed=seed, epoch=epoch)) for i in indices]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < n)).all()
    assert len(set(together.tolist())) == len(set(indices.tolist()))


def test_seed_and_epoch_are_not_a_sum() -> None:
    orders = {
        (s, e): tuple(order(64, seed=s, epoch=e).tolist()) for s in range(8) for e in range(8)
    }
    assert len(set(orders.values())) == len(orders)


def test_shape_and_dtype_are_kept() -> None:
    found = feistel_permutation(np.arange(6, dtype=np.int32).reshape(2, 3), 6, seed=1, epoch=0)
    assert found.shape == (2, 3)
    assert found.dtype == np.int64


def test_neighbours_land_anywhere() -> None:
    """Row p + 1 minus row p is uniform over the circle: chi-square of 64 bins, 63 degrees, 6 sigma is 130."""
    n = 100_000
    for seed in range(5):
        gaps = np.diff(order(n, seed=seed)) % n
        counts = np.bincount(gaps * 64 // n, minlength=64)
        expected = (n - 1) / 64
        assert ((counts - expected) ** 2 / expected).sum() < 130


def test_places_are_uniform_over_seeds() -> None:
    """Where index 0 of 16 lands over 4000 seeds: chi-square of 16 bins, 15 degrees, 6 sigma is 48."""
    places = [int(feistel_permutation(np.array(0), 16, seed=s, epoch=0)) for s in range(4000)]
    counts = np.bincount(places, minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 48


@pytest.mark.parametrize("index", [-1, 10, 2**63 - 1])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError):
        feistel_permutation(np.array([index]), 10, seed=0, epoch=0)


@pytest.mark.parametrize("seed, epoch", [(-1, 0), (2**64, 0), (0, -1)])
def test_a_key_outside_64_bits_is_refused(seed: int, epoch: int) -> None:
    with pytest.raises(ConfigError):
        feistel_permutation(np.array([0]), 10, seed=seed, epoch=epoch)
