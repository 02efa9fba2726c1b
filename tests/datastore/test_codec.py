"""The blob: what goes in comes out within the stated error, in few bytes, and decodes to what encodes again.

`python -m tests.datastore.test_codec` writes the golden files anew; only a new CODEC_VERSION allows that.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AlignmentError, FormatError
from datastore.codec import decode_blob, encode_blob
from datastore.codec_masses import MAX_HEAD_ERROR
from datastore.codec_target import MAX_REALISED_ERROR
from datastore.id_order import IdOrder
from datastore.target import content_key, position_uniforms, reduce_logprobs, require_valid
from datastore.types import DocTarget, PackedRow, SparseTarget, TargetSums
from tests.datastore.codec_cases import (
    ARRAYS,
    EDGE_IDS,
    as_arrays,
    from_arrays,
    golden_case,
    golden_row,
    make_row,
    row_of,
    some_order,
)

GOLDEN = Path(__file__).parent / "golden"
PREFIX_BYTES, HEADER_BYTES = 12, 40
ORDER = some_order()
THRESHOLDS = [1 / 254, 1 / 100, 1 / 50, 1 / 25, 1 / 12, 1 / 3, 1 / 2]


def entries_of(target: SparseTarget) -> tuple[np.ndarray, np.ndarray]:
    """Which entries are heads (bool [E]), and a key of each entry that sorts by position, then id."""
    counts_P = np.diff(target.offsets_P1)
    place_E = np.arange(len(target.ids_E)) - np.repeat(target.offsets_P1[:-1], counts_P)
    rows_E = np.repeat(np.arange(len(counts_P)), counts_P)
    return place_E < np.repeat(target.num_head_P, counts_P), rows_E * 201_088 + target.ids_E


def assert_same_ids(before: SparseTarget, after: SparseTarget) -> None:
    """Heads entry by entry, draws as sets."""
    for name in ("positions_P", "num_head_P", "offsets_P1"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype
    (head_E, keys_E), (_, found_E) = entries_of(before), entries_of(after)
    np.testing.assert_array_equal(found_E[head_E], keys_E[head_E])
    np.testing.assert_array_equal(np.sort(found_E[~head_E]), np.sort(keys_E[~head_E]))
    assert after.ids_E.dtype == np.int32


def assert_stored(documents: list[DocTarget | None], found: list[DocTarget | None]) -> None:
    """All exact but logprobs, and those within the stated errors."""
    assert len(documents) == len(found)
    for document, decoded in zip(documents, found, strict=True):
        if document is None or decoded is None:
            assert document is decoded is None
            continue
        before, after = document.target, decoded.target
        assert decoded.content_key == document.content_key
        assert decoded.entropy_sums == document.entropy_sums
        assert after.threshold == before.threshold and after.entropy_P is None
        assert_same_ids(before, after)
        head_E, _ = entries_of(before)
        np.testing.assert_array_equal(after.weights_E[~head_E], before.weights_E[~head_E])
        error = np.abs(np.log(after.weights_E[head_E]) - np.log(before.weights_E[head_E]))
        assert error.max(initial=0) <= MAX_HEAD_ERROR
        assert np.all((after.weights_E > 0) & (after.weights_E <= 1))
        assert np.all(after.realised_logprob_P <= 0)
        gap = np.abs(after.realised_logprob_P - before.realised_logprob_P)
        assert gap.max(initial=0) <= MAX_REALISED_ERROR
        tails = [np.exp(t.log_tail_mass_P.astype(np.float64)) for t in (before, after)]
        # Half a raw step of the cell t, or an eighth of a nat of a tail below 2 t.
        assert np.abs(tails[0] - tails[1]).max(initial=0) <= before.threshold * 0.27
        assert after.weights_E.dtype == after.realised_logprob_P.dtype == np.float32


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(0, 2**32),
    st.sampled_from(THRESHOLDS),
    st.sampled_from([0.0, 1.0, 4.0, 30.0]),  # from no head at all to hardly any draw
    st.integers(0, 63),
)
@settings(max_examples=150, deadline=None)
def test_round_trip(sizes, seed, threshold, spread, unscored):
    documents, row = make_row(sizes, seed, threshold, spread)
    documents = [None if unscored >> i & 1 else document for i, document in enumerate(documents)]
    if not any(documents):
        documents[0] = make_row(sizes, seed, threshold, spread)[0][0]
    blob = encode_blob(documents, row, ORDER)
    found = decode_blob(blob, row, ORDER)
    assert_stored(documents, found)
    assert encode_blob(found, row, ORDER) == blob


def test_errors_in_the_mean():
    """Over 4,000 positions: no bias, and a spread far below the worst case."""
    documents, row = make_row([4000], seed=3, spread=3.5)
    (found,) = decode_blob(encode_blob(documents, row, ORDER), row, ORDER)
    before, after = documents[0].target, found.target
    head_E, _ = entries_of(before)
    error = np.log(after.weights_E[head_E]) - np.log(before.weights_E[head_E])
    assert abs(error.mean()) <= 4 * error.std() / math.sqrt(len(error)) + 1e-3
    assert error.std() <= 0.02
    error = after.realised_logprob_P - before.realised_logprob_P
    assert np.quantile(np.abs(error), 0.999) <= 1 / 64 + 1e-6
    assert abs(error.mean()) <= 4 * error.std() / math.sqrt(len(error))


def one_position(probs: dict[int, float], threshold: float = 1 / 50, **changes) -> SparseTarget:
    """A head alone, of mass 1, whose first id is realised; `changes` replace fields."""
    target = SparseTarget(
        threshold=threshold,
        positions_P=np.array([3], dtype=np.int32),
        num_head_P=np.array([len(probs)], dtype=np.int32),
        offsets_P1=np.array([0, len(probs)], dtype=np.int64),
        ids_E=np.array(list(probs), dtype=np.int32),
        weights_E=np.array(list(probs.values()), dtype=np.float32),
        realised_logprob_P=np.log(np.array(list(probs.values())[:1], dtype=np.float32)),
        log_tail_mass_P=np.array([-np.inf], dtype=np.float32),
    )
    return replace(target, **changes)


def as_document(target: SparseTarget, **sums: float) -> DocTarget:
    entropy_sums = TargetSums(**{"reasoning": 1.0, "final": 0.0, "control": 0.5, **sums})
    return DocTarget(content_key=2**64 - 1, target=target, entropy_sums=entropy_sums)


def stored(target: SparseTarget, realised: int) -> SparseTarget:
    """One position through the blob."""
    row = row_of([target.positions_P], [np.array([realised])])
    documents = [as_document(target)]
    (found,) = decode_blob(encode_blob(documents, row, ORDER), row, ORDER)
    assert_stored(documents, [found])
    return found.target


@pytest.mark.parametrize("order", [IdOrder.identity(), ORDER], ids=["identity", "permuted"])
@pytest.mark.parametrize("token", EDGE_IDS)
def test_every_id_is_kept(token, order):
    """As the realised head entry, and beside one."""
    for realised in (token, 77):
        document = as_document(one_position({77: 0.5, token: 0.5}))
        row = row_of([document.target.positions_P], [np.array([realised])])
        found = decode_blob(encode_blob([document], row, order), row, order)
        assert_stored([document], found)


def test_a_certain_head_keeps_its_certainty():
    """The mass outside is kept to an eighth of a nat, so 1 - 1e-6 is not mistaken for 1 - 1e-3."""
    for outside in (1e-3, 1e-6, 1e-12):
        target = one_position({7: 1 - outside}, log_tail_mass_P=np.log(np.float32([outside])))
        found = stored(target, 7)
        assert abs(found.log_tail_mass_P[0] - math.log(outside)) <= 1 / 8 + 1e-5
        assert found.weights_E[0] == np.float32(1 - np.exp(np.float64(found.log_tail_mass_P[0])))
    assert stored(one_position({7: 1.0}), 7).weights_E[0] == 1.0


@pytest.mark.parametrize("threshold", [1 / 254, 1 / 52, 1 / 50, 1 / 2])
def test_steps_reach_the_threshold(threshold):
    """A head of one certain-like id and one at the very threshold: the widest range that a byte must hold."""
    found = stored(one_position({5: 1 - threshold, 9: threshold}, threshold), 5)
    assert abs(math.log(found.weights_E[1] / threshold)) <= 1 / 16


def test_an_unlikely_realised_token():
    """Far below the threshold: to 1/64 nat down to 256 nats below it, and held there."""
    for logprob in (-4.0, -30.0, -250.0):
        target = one_position({5: 1.0}, realised_logprob_P=np.float32([logprob]))
        assert abs(stored(target, 6).realised_logprob_P[0] - logprob) <= 1 / 64 + 1e-4
    document = as_document(one_position({5: 1.0}, realised_logprob_P=np.float32([-1e4])))
    row = row_of([document.target.positions_P], [np.array([6])])
    (found,) = decode_blob(encode_blob([document], row, ORDER), row, ORDER)
    assert abs(found.target.realised_logprob_P[0] - (math.log(1 / 50) - 256)) <= 1 / 64 + 1e-4


def test_usual_ids_cost_fewer_bytes():
    """The same text coded by a teacher of Zipf's law: an order that knows the frequencies saves 3 bits an id."""
    rng = np.random.default_rng(0)
    by_rank = rng.permutation(201_088)
    logprobs_V = -np.log(np.arange(201_088) + 2.0)
    logprobs_V -= np.log(np.exp(logprobs_V).sum())
    positions_P = np.arange(20, dtype=np.int32)
    realised_P = by_rank[rng.integers(0, 5000, 20)]
    row = row_of([positions_P], [realised_P])
    key = content_key(row.tokens_T[: row.doc_ends_D[0]])
    target = reduce_logprobs(
        np.tile(logprobs_V[np.argsort(by_rank)], (20, 1)),
        realised_P,
        positions_P,
        position_uniforms(key, positions_P),
        1 / 50,
    )
    documents = [as_document(target)]
    documents[0] = replace(documents[0], content_key=key)
    known, unknown = (len(encode_blob(documents, row, o)) for o in (IdOrder.of(by_rank), ORDER))
    assert unknown - known >= 3 / 8 * len(target.ids_E)


REFUSED = {
    "id above the vocabulary": one_position({201088: 1.0}),
    "negative id": one_position({-1: 1.0}),
    "weight above 1": one_position({4: 1.0 + 1e-4}),
    "head below the threshold": one_position({4: 0.985, 5: 0.015}),
    "head not a number": one_position({4: math.nan}),
    "unsorted head": one_position({4: 0.4, 5: 0.6}),
    "mass above 1": one_position({4: 0.6, 5: 0.6}),
    "mass below 1": one_position({4: 0.6}),
    "id twice": one_position({4: 0.5, 5: 0.5}, ids_E=np.array([4, 4])),
    "positive realised logprob": one_position({4: 1.0}, realised_logprob_P=np.array([1e-6])),
    "infinite realised logprob": one_position({4: 1.0}, realised_logprob_P=np.array([-np.inf])),
    "unknown realised logprob": one_position({4: 1.0}, realised_logprob_P=np.array([np.nan])),
    "realised logprob not that of the head": one_position(
        {4: 0.6, 5: 0.4}, realised_logprob_P=np.log([0.4])
    ),
    "realised logprob of a head entry, without one": one_position({9: 1.0}),
    "positive tail": one_position({4: 1.0}, log_tail_mass_P=np.array([0.1])),
    "unknown tail": one_position({4: 1.0}, log_tail_mass_P=np.array([np.nan])),
    "head longer than its entries": one_position({4: 1.0}, num_head_P=np.array([2])),
    "negative head": one_position({4: 1.0}, num_head_P=np.array([-1])),
    "offsets past the entries": one_position({4: 1.0}, offsets_P1=np.array([0, 2])),
    "offsets that fall": one_position(
        {4: 1.0}, offsets_P1=np.array([0, 2, 1]), num_head_P=np.array([1, 0]),
        realised_logprob_P=np.zeros(2), log_tail_mass_P=np.full(2, -np.inf),
    ),
    "arrays of two lengths": one_position({4: 1.0}, realised_logprob_P=np.zeros(2)),
    "too few draws": one_position({4: 0.5}, log_tail_mass_P=np.log([0.5])),
    "threshold out of range": one_position({4: 1.0}, threshold=1 / 300),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_encode_refuses(fault):
    """The realised id is 4."""
    row = row_of([np.array([3], dtype=np.int32)], [np.array([4])])
    with pytest.raises(FormatError):
        encode_blob([as_document(REFUSED[fault])], row, ORDER)


def test_encode_refuses_faulty_draws():
    """A real reduction with its draws spoiled, one rule at a time."""
    documents, row = make_row([4], seed=6)
    target = documents[0].target
    first, last = int(target.num_head_P[0]), int(target.offsets_P1[1])
    assert last - first >= 2
    twice, heavy = target.ids_E.copy(), target.weights_E.copy()
    twice[first] = twice[last - 1]
    heavy[first] *= 1.01
    for spoiled in (replace(target, ids_E=twice), replace(target, weights_E=heavy)):
        with pytest.raises(FormatError, match=r"draw|twice"):
            encode_blob([replace(documents[0], target=spoiled)], row, ORDER)
    # With another content key the uniform numbers, and so the numbers of draws, are others.
    documents, row = make_row([40], seed=6)
    with pytest.raises(FormatError, match="uniform numbers"):
        encode_blob([replace(documents[0], content_key=5)], row, ORDER)


def test_encode_refuses_faulty_rows():
    documents, row = make_row([3, 4], seed=8)
    one, two = documents
    with pytest.raises(FormatError, match="at least one"):
        encode_blob([None, None], row, ORDER)
    with pytest.raises(AlignmentError, match="1 documents"):
        encode_blob([one], row, ORDER)
    with pytest.raises(AlignmentError, match="other positions"):
        encode_blob([two, one], row, ORDER)
    coarser, _ = make_row([3, 4], seed=8, threshold=1 / 25)
    with pytest.raises(AlignmentError, match="one threshold"):
        encode_blob([one, coarser[1]], row, ORDER)
    for value in (-1.0, math.nan, math.inf):
        sums = TargetSums(reasoning=1.0, final=value, control=0.5)
        with pytest.raises(FormatError, match="entropy sums"):
            encode_blob([replace(one, entropy_sums=sums), two], row, ORDER)


def test_repacking_keeps_documents():
    """Documents coded again in another row, order and company: nothing drifts after the first storing."""
    documents, row = make_row([6, 6, 6, 6], seed=0)
    found = decode_blob(encode_blob(documents, row, ORDER), row, ORDER)
    moved = [found[2], None, found[0]]
    parts = (
        [row.tokens_T[doc] for doc in row.documents()],
        [row.spans_T[d] for d in row.documents()],
    )
    other = PackedRow(
        tokens_T=np.concatenate([parts[0][i] for i in (2, 1, 0)]),
        spans_T=np.concatenate([parts[1][i] for i in (2, 1, 0)]),
        doc_ends_D=np.cumsum([len(parts[0][i]) for i in (2, 1, 0)]).astype(np.int32),
        doc_ids=(b"",) * 3,
        row_hash=0,
        languages=("",) * 3,
        exercises=("",) * 3,
    )
    identity = IdOrder.identity()
    again = decode_blob(encode_blob(moved, other, identity), other, identity)
    assert again[1] is None
    for before, after in ((moved[0], again[0]), (moved[2], again[2])):
        assert after.content_key == before.content_key
        assert_same_ids(before.target, after.target)
        for name in ("weights_E", "realised_logprob_P", "log_tail_mass_P"):
            np.testing.assert_array_equal(getattr(after.target, name), getattr(before.target, name))


def payload_of(blob: bytes) -> bytes:
    frame = blob[HEADER_BYTES:]
    size = int.from_bytes(blob[PREFIX_BYTES + 16 : PREFIX_BYTES + 20], "little")
    return zstandard.ZstdDecompressor().decompress(frame[:size]) + frame[size:]


def test_golden_blob_decodes_to_its_arrays():
    arrays = dict(np.load(GOLDEN / "decoded.npz"))
    expected, row = from_arrays(arrays), golden_row(arrays)
    found = decode_blob((GOLDEN / "blob.bin").read_bytes(), row, ORDER)
    assert [d.content_key for d in found] == [d.content_key for d in expected]
    assert [d.entropy_sums for d in found] == [d.entropy_sums for d in expected]
    for before, after in zip(expected, found, strict=True):
        for name in ARRAYS:
            # exp and log may round differently between machines
            exact = 0 if name not in ARRAYS[4:] else 1e-6
            np.testing.assert_allclose(
                getattr(after.target, name), getattr(before.target, name), rtol=exact
            )


def test_golden_arrays_encode_to_the_golden_payload():
    """zstd's bytes may change between its versions; what they hold, and the raw bits, may not."""
    arrays = dict(np.load(GOLDEN / "reduced.npz"))
    golden = (GOLDEN / "blob.bin").read_bytes()
    found = encode_blob(from_arrays(arrays), golden_row(arrays), ORDER)
    assert payload_of(found) == payload_of(golden)


def test_golden_targets_are_valid_and_varied():
    documents = from_arrays(dict(np.load(GOLDEN / "reduced.npz")))
    assert all(require_valid(d.target) is not None for d in documents)
    heads = np.concatenate([d.target.num_head_P for d in documents])
    draws = np.concatenate([np.diff(d.target.offsets_P1) - d.target.num_head_P for d in documents])
    assert heads.min() == 0 and heads.max() > 3 and draws.max() >= 50 and draws.min() <= 1
    assert max(d.target.ids_E.max(initial=0) for d in documents) > 196_608


def write_golden() -> None:
    documents, row = golden_case()
    blob = encode_blob(documents, row, ORDER)
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "blob.bin").write_bytes(blob)
    arrays = {f"row.{n}": getattr(row, n) for n in ("tokens_T", "spans_T", "doc_ends_D")}
    np.savez_compressed(GOLDEN / "reduced.npz", **as_arrays(documents), **arrays)
    decoded = decode_blob(blob, row, ORDER)
    np.savez_compressed(GOLDEN / "decoded.npz", **as_arrays(decoded), **arrays)


if __name__ == "__main__":
    write_golden()
