"""The same list of global batches for every topology and from every resume point."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, ResumeError
from datastore.order import feistel_permutation, in_share
from datastore.row_set import RowSet
from datastore.stream import RowStream, rank_micro_batches

GOLDEN = Path(__file__).parent / "golden" / "mix.txt"
RUN = {"fingerprint": "f" * 64, "seed": 2**64 - 1, "global_batch_size": 24}
NUM_ROWS = 53


def stream(**changes) -> RowStream:
    return RowStream(NUM_ROWS, **(RUN | changes))


def every_third(num_rows: int = NUM_ROWS) -> RowSet:
    return RowSet(np.arange(num_rows) % 3 == 0)


def mixed(share: float = 0.4, **changes) -> RowStream:
    return stream(kd_share=share, scored=every_third(), **changes)


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


@pytest.mark.parametrize("source", [stream, mixed])
@pytest.mark.parametrize("dp_size", divisors(24))
def test_ranks_hold_the_global_batch_as_a_list(dp_size: int, source) -> None:
    for micro_batch_size in divisors(24 // dp_size):
        for global_batch in batches(source(), 5):
            parts = micro_batches_of_all_ranks(np.array(global_batch), dp_size, micro_batch_size)
            assert {len(part) for part in parts} == {micro_batch_size}
            assert np.concatenate(parts).tolist() == global_batch


@pytest.mark.parametrize("source", [stream, mixed])
def test_resume_from_every_step_under_another_topology(source) -> None:
    whole = batches(source(), 12)
    for stop in range(12):
        first = source()
        batches(first, stop)
        saved = json.loads(json.dumps(first.state()))
        again = source().resumed(saved)
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
        source = stream().resumed(source.state())
    assert seen == whole


def test_peek_far_ahead_is_the_batch_that_comes() -> None:
    source = stream().resumed(stream().state() | {"consumed": 24 * 10**9})
    assert source.peek(10**9).tolist() == source.next_batch().tolist()
    assert source.consumed == 24 * (10**9 + 1)


def test_state_is_small_json() -> None:
    state = stream().state() | {"consumed": 24 * 10**12}
    assert len(json.dumps(state)) < 1024
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "e" * 64},
        {"seed": 5},
        {"global_batch_size": 12},
        {"version": 1},
        {"version": "2"},
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
    state = stream().state() | {"consumed": 24} | change
    with pytest.raises(ResumeError, match=next(iter(change))):
        stream().resumed(state)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"kd_share": 0.5}, "kd_share"),
        ({"kd_share": 0.0}, "scored_rows"),
        ({"scored": RowSet(np.arange(NUM_ROWS) % 3 == 1)}, "scored_sha256"),
        ({"scored": RowSet(np.arange(NUM_ROWS) % 2 == 0)}, "scored_rows"),
        ({"scored": RowSet(np.ones(NUM_ROWS, bool))}, "scored_rows"),
    ],
)
def test_another_mix_is_refused_with_its_difference(changes: dict, key: str) -> None:
    state = json.loads(json.dumps(mixed().state()))
    assert mixed().resumed(state).state() == state
    other = stream(**({"kd_share": 0.4, "scored": every_third()} | changes))
    with pytest.raises(ResumeError, match=key):
        other.resumed(state)


def test_golden_mixes_made_by_another_program() -> None:
    """Rows and flags of a C program written from docs/order.md."""
    lines = [x for x in GOLDEN.read_text().splitlines() if not x.startswith("#")]
    assert len(lines) == 192
    for line in lines:
        key, values = line.split(":")
        seed, share, n, d, w, first = key.split()
        scored = [mix(row) % int(d) < int(w) for row in range(int(n))]
        source = RowStream(
            int(n),
            fingerprint="f",
            seed=int(seed),
            global_batch_size=24,
            kd_share=float(share),
            scored=RowSet(np.array(scored)),
        )
        rows, uses = source.peek(int(first) // 24), source.uses_targets(int(first) // 24)
        found = [f"{row}t" if used else str(row) for row, used in zip(rows, uses, strict=True)]
        assert found == values.split(), key


def mix(value: int) -> int:
    """The finaliser of splitmix64, as docs/order.md has it."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> shift)) * factor % 2**64
    return value ^ (value >> 31)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_where_every_row_is_scored_there_is_the_one_order(share: float) -> None:
    """The order of a run without targets, which is the permutation itself; the share only marks positions."""
    every = stream(kd_share=share, scored=RowSet(np.ones(NUM_ROWS, bool)))
    first = feistel_permutation(np.arange(NUM_ROWS), NUM_ROWS, seed=RUN["seed"], epoch=0)
    assert np.concatenate(batches(every, 3))[:NUM_ROWS].tolist() == first.tolist()
    assert [every.peek(b).tolist() for b in range(30)] == batches(stream(), 30)
    used = np.concatenate([every.uses_targets(b) for b in range(50)])
    assert abs(used.sum() - 1200 * share) < 1


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9, 1.0])
def test_a_mix_takes_each_pool_once_an_epoch_of_its_own(share: float) -> None:
    source = mixed(share, global_batch_size=10)
    rows = np.concatenate([source.peek(b) for b in range(300)])
    uses = np.concatenate([source.uses_targets(b) for b in range(300)])
    is_scored = every_third().mask()
    assert (is_scored[rows] == uses).all()
    for pool in (True, False):
        order = rows[uses == pool]
        size = int((is_scored == pool).sum())
        whole = order[: len(order) // size * size].reshape(-1, size)
        assert (np.sort(whole, axis=1) == np.flatnonzero(is_scored == pool)).all()
        if len(whole) > 1:
            assert len({tuple(epoch) for epoch in whole.tolist()}) == len(whole)


def test_both_pools_are_in_orders_of_their_own() -> None:
    """Pools of one size: the plain rows do not follow the scored ones."""
    half = RowSet(np.arange(60) % 2 == 0)
    source = RowStream(60, **RUN, kd_share=0.5, scored=half)
    rows = np.concatenate([source.peek(b) for b in range(20)])
    uses = np.concatenate([source.uses_targets(b) for b in range(20)])
    together = (rows[uses] // 2 == rows[~uses] // 2).sum()
    assert together < 24, "of 240 pairs one in 30 meets by chance"


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.7])
def test_every_global_batch_holds_its_share(share: float) -> None:
    source = mixed(share)
    counts = Counter(int(source.uses_targets(b).sum()) for b in range(500))
    assert max(counts) - min(counts) <= 1
    assert abs(sum(k * n for k, n in counts.items()) - share * 24 * 500) < 1


def test_a_share_of_the_positions_uses_targets() -> None:
    for share in (0.0, 0.25, 0.3, 0.5, 1.0):
        used_P = in_share(np.arange(1000), share)
        assert abs(used_P.sum() - 1000 * share) < 1 + 1e-9
        windows = np.lib.stride_tricks.sliding_window_view(used_P, 16).sum(axis=1)
        assert windows.max() - windows.min() <= 1
    np.testing.assert_array_equal(
        in_share(np.arange(40), 0.3)[17:], in_share(np.arange(17, 40), 0.3)
    )


@pytest.mark.parametrize("scored", [None, RowSet(np.zeros(NUM_ROWS, bool))])
def test_a_share_of_no_scored_rows_is_refused_with_what_to_do(scored) -> None:
    with pytest.raises(ConfigError, match="kd_share=0"):
        stream(kd_share=0.1, scored=scored)
    assert batches(stream(kd_share=0.0, scored=scored), 2) == batches(stream(), 2)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="kd_share"):
        mixed(share)


@pytest.mark.parametrize("key", list(stream().state()))
def test_a_state_without_a_key_is_refused(key: str) -> None:
    state = stream().state()
    del state[key]
    with pytest.raises(ResumeError, match=key):
        stream().resumed(state)


def test_the_refusal_lists_every_difference_at_once() -> None:
    state = stream().state() | {"seed": 5, "global_batch_size": 12}
    with pytest.raises(ResumeError) as caught:
        stream().resumed(state)
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
