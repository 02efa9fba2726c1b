"""The same list of global batches for every topology and from every resume point."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, ResumeError
from datastore.stream import RowStream, rank_micro_batches

RUN = {"fingerprint": "f" * 64, "seed": 2**64 - 1, "global_batch_size": 24}
NUM_ROWS = 53


def stream(**changes) -> RowStream:
    return RowStream(NUM_ROWS, **(RUN | changes))


def batches(source: RowStream, count: int) -> list[list[int]]:
    return [source.next_batch().tolist() for _ in range(count)]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def micro_batches_of_all_ranks(
    indices_B: np.ndarray, dp_size: int, micro_batch_size: int
) -> list[np.ndarray]:
    return [
        micro_batch
        for rank in range(dp_size)
        for micro_batch in rank_micro_batches(
            indices_B, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro_batch_size
        )
    ]


def test_every_epoch_holds_every_row_once() -> None:
    rows = np.concatenate([stream().peek(b) for b in range(NUM_ROWS)])
    epochs = rows.reshape(RUN["global_batch_size"], NUM_ROWS)
    assert (np.sort(epochs, axis=1) == np.arange(NUM_ROWS)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_a_batch_longer_than_the_data_crosses_several_epochs() -> None:
    long = RowStream(5, fingerprint="f", seed=3, global_batch_size=23).next_batch()
    short = RowStream(5, fingerprint="f", seed=3, global_batch_size=1)
    assert long.tolist() == [int(short.next_batch()[0]) for _ in range(23)]


def test_order_does_not_depend_on_the_batch_size() -> None:
    one = np.concatenate([stream(global_batch_size=8).peek(b) for b in range(6)])
    other = np.concatenate([stream(global_batch_size=12).peek(b) for b in range(4)])
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize("dp_size", divisors(24))
def test_ranks_hold_the_global_batch_as_a_list(dp_size: int) -> None:
    for micro_batch_size in divisors(24 // dp_size):
        for global_batch in batches(stream(), 5):
            parts = micro_batches_of_all_ranks(np.array(global_batch), dp_size, micro_batch_size)
            assert {len(part) for part in parts} == {micro_batch_size}
            assert np.concatenate(parts).tolist() == global_batch


def test_resume_from_every_step_under_another_topology() -> None:
    whole = batches(stream(), 12)
    for stop in range(12):
        first = stream()
        batches(first, stop)
        saved = json.loads(json.dumps(first.state()))
        again = RowStream.restore(saved, num_rows=NUM_ROWS, **RUN)
        dp_size = divisors(24)[stop % 8]
        rest = [
            np.concatenate(micro_batches_of_all_ranks(again.next_batch(), dp_size, 1)).tolist()
            for _ in range(stop, 12)
        ]
        assert rest == whole[stop:]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_many_resumes_in_a_row(steps: list[int]) -> None:
    whole = batches(stream(), sum(steps))
    source, seen = stream(), []
    for count in steps:
        seen += batches(source, count)
        source.peek(10**6)
        source = RowStream.restore(source.state(), num_rows=NUM_ROWS, **RUN)
    assert seen == whole


def test_peek_far_ahead_is_the_batch_that_comes() -> None:
    source = stream(consumed=24 * 10**9)
    assert source.peek(10**9).tolist() == source.next_batch().tolist()
    assert source.consumed == 24 * (10**9 + 1)


def test_state_is_small_json() -> None:
    state = stream(consumed=24 * 10**12).state()
    assert len(json.dumps(state)) < 1024
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "e" * 64},
        {"seed": 5},
        {"global_batch_size": 12},
        {"version": 2},
        {"version": "1"},
        {"seed": None},
        {"seed": float(2**64)},
        {"extra": 1},
        {"consumed": "24"},
        {"consumed": True},
        {"consumed": -24},
        {"consumed": 25},
        {"consumed": 24.0},
    ],
)
def test_a_state_of_another_run_is_refused(change: dict) -> None:
    state = stream(consumed=24).state() | change
    with pytest.raises(ResumeError, match=next(iter(change))):
        RowStream.restore(state, num_rows=NUM_ROWS, **RUN)


@pytest.mark.parametrize("key", list(stream().state()))
def test_a_state_without_a_key_is_refused(key: str) -> None:
    state = stream().state()
    del state[key]
    with pytest.raises(ResumeError, match=key):
        RowStream.restore(state, num_rows=NUM_ROWS, **RUN)


def test_the_refusal_lists_every_difference_at_once() -> None:
    state = stream().state() | {"seed": 5, "global_batch_size": 12}
    with pytest.raises(ResumeError) as caught:
        RowStream.restore(state, num_rows=NUM_ROWS, **RUN)
    assert "seed: checkpoint 5, this run 18446744073709551615" in str(caught.value)
    assert "global_batch_size: checkpoint 12, this run 24" in str(caught.value)
    assert "fingerprint" not in str(caught.value)


@pytest.mark.parametrize(
    "rank, size, micro", [(0, 5, 1), (0, 2, 5), (2, 2, 1), (-1, 2, 1), (0, 1, 0)]
)
def test_sizes_that_do_not_divide_are_refused(rank: int, size: int, micro: int) -> None:
    with pytest.raises(ConfigError):
        rank_micro_batches(np.arange(24), dp_rank=rank, dp_size=size, micro_batch_size=micro)


@pytest.mark.parametrize("rows, batch", [(0, 1), (1, 0)])
def test_an_empty_stream_is_refused(rows: int, batch: int) -> None:
    with pytest.raises(ConfigError):
        RowStream(rows, fingerprint="f", seed=0, global_batch_size=batch)
