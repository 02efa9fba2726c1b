"""The blob: what goes in comes out within the stated error, and no damaged byte is ever believed.

`python tests/datastore/test_codec.py` writes the golden files anew; only a new CODEC_VERSION allows that.
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
from datastore.codec import decode_blob, encode_blob, steps_per_nat
from datastore.target import position_uniforms, reduce_logprobs, require_valid
from datastore.types import DocTarget, SparseTarget, TargetSums

GOLDEN = Path(__file__).parent / "golden"
PREFIX_BYTES, HEADER_BYTES = 12, 40
EDGE_IDS = [0, 1, 255, 256, 65535, 65536, 131071, 131072, 199998, 201086, 201087]


def make_document(
    seed: int, positions: int, *, threshold: float = 1 / 50, spread: float = 2.5, vocab: int = 600
) -> DocTarget:
    """A reduced random teacher whose ids are spread over the whole vocabulary, its edges included."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(positions, vocab)) * spread
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    positions_P = np.sort(rng.choice(3 * positions, positions, replace=False)).astype(np.int32)
    target = reduce_logprobs(
        logprobs,
        rng.integers(0, vocab, positions),
        positions_P,
        position_uniforms(seed, positions_P),
        threshold,
    )
    ids_V = np.union1d(rng.integers(0, 201088, 2 * vocab), EDGE_IDS)
    ids_V = np.union1d(rng.choice(ids_V, vocab, replace=False), EDGE_IDS)
    sums = rng.uniform(0, 1000, 3).tolist()
    return DocTarget(
        content_key=int(rng.integers(0, 2**64, dtype=np.uint64)),
        target=replace(target, ids_E=ids_V[target.ids_E].astype(np.int32)),
        entropy_sums=TargetSums(reasoning=sums[0], final=sums[1], control=sums[2]),
    )


def positions_of(documents: list[DocTarget]) -> list[np.ndarray]:
    return [document.target.positions_P for document in documents]


def head_of(target: SparseTarget) -> np.ndarray:
    rank_E = np.arange(len(target.ids_E)) - np.repeat(
        target.offsets_P1[:-1], np.diff(target.offsets_P1)
    )
    return rank_E < np.repeat(target.num_head_P, np.diff(target.offsets_P1))


def assert_stored(documents: list[DocTarget], found: list[DocTarget]) -> None:
    """Everything exact but logprobs: half a step for heads, half an fp16 step for the rest."""
    assert len(documents) == len(found)
    for document, decoded in zip(documents, found, strict=True):
        before, after = document.target, decoded.target
        assert (decoded.content_key, decoded.entropy_sums) == (
            document.content_key,
            document.entropy_sums,
        )
        assert after.threshold == before.threshold
        for name in ("positions_P", "num_head_P", "offsets_P1", "ids_E"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
            assert getattr(after, name).dtype == getattr(before, name).dtype
        in_head_E = head_of(before)
        np.testing.assert_array_equal(after.weights_E[~in_head_E], before.weights_E[~in_head_E])
        error = np.abs(np.log(after.weights_E[in_head_E]) - np.log(before.weights_E[in_head_E]))
        assert error.max(initial=0) <= 0.5 / steps_per_nat(before.threshold) + 1e-6
        assert np.all((after.weights_E > 0) & (after.weights_E <= 1))
        for name in ("realised_logprob_P", "log_tail_mass_P"):
            np.testing.assert_allclose(
                getattr(after, name), getattr(before, name), rtol=2**-11, atol=2**-25
            )
        assert after.weights_E.dtype == after.realised_logprob_P.dtype == np.float32
        assert after.entropy_P is None


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(0, 2**32),
    st.sampled_from([1 / 254, 1 / 53, 1 / 52, 1 / 50, 1 / 25, 1 / 3, 1 / 2]),
    st.sampled_from([0.0, 1.0, 4.0, 30.0]),  # from no head at all to hardly any draw
)
@settings(max_examples=100, deadline=None)
def test_round_trip(sizes, seed, threshold, spread):
    documents = [
        make_document(seed + i, size, threshold=threshold, spread=spread)
        for i, size in enumerate(sizes)
    ]
    assert_stored(documents, decode_blob(encode_blob(documents), positions_of(documents)))


def payload_of(blob: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(blob[HEADER_BYTES:])


def one_position(probs: dict[int, float], threshold: float = 1 / 50, **changes) -> SparseTarget:
    """A head alone, of mass 1; `changes` replace fields."""
    target = SparseTarget(
        threshold=threshold,
        positions_P=np.array([3], dtype=np.int32),
        num_head_P=np.array([len(probs)], dtype=np.int32),
        offsets_P1=np.array([0, len(probs)], dtype=np.int64),
        ids_E=np.array(list(probs), dtype=np.int32),
        weights_E=np.array(list(probs.values()), dtype=np.float32),
        realised_logprob_P=np.array([-1.5], dtype=np.float32),
        log_tail_mass_P=np.array([-np.inf], dtype=np.float32),
    )
    return replace(target, **changes)


def as_document(target: SparseTarget, **sums: float) -> DocTarget:
    entropy_sums = TargetSums(**{"reasoning": 1.0, "final": 0.0, "control": 0.5, **sums})
    return DocTarget(content_key=2**64 - 1, target=target, entropy_sums=entropy_sums)


@pytest.mark.parametrize("token", EDGE_IDS)
def test_every_byte_of_an_id_is_kept(token):
    document = as_document(one_position({token: 1.0}))
    assert_stored([document], decode_blob(encode_blob([document]), positions_of([document])))


def test_a_certain_head_stays_a_probability():
    """1 - 2^-24, the float32 below 1: its logprob is an fp16 subnormal and must not come back above 1."""
    document = as_document(
        one_position({7: 1 - 2.0**-24}, log_tail_mass_P=np.array([-16.6], np.float32))
    )
    found = decode_blob(encode_blob([document]), positions_of([document]))[0].target
    assert 1 - 2.0**-23 <= found.weights_E[0] <= 1
    assert found.log_tail_mass_P[0] == np.float16(-16.6)


@pytest.mark.parametrize("threshold", [1 / 254, 1 / 52, 1 / 50, 1 / 2])
def test_steps_reach_the_threshold(threshold):
    """A head of one certain-like id and one at the very threshold: the widest range that a byte must hold."""
    document = as_document(one_position({5: 1 - threshold, 9: threshold}, threshold))
    found = decode_blob(encode_blob([document]), positions_of([document]))[0].target
    assert abs(math.log(found.weights_E[1] / threshold)) <= 0.5 / steps_per_nat(threshold) + 1e-6


def test_errors_stated_for_the_thresholds():
    """The most that a head logprob may be off: 1/128 nat at 1/50, never above 1/32."""
    assert 0.5 / steps_per_nat(1 / 50) <= 1 / 128
    assert all(0.5 / steps_per_nat(1 / n) <= 1 / 32 for n in range(2, 255))


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
    "realised logprob that fp16 cannot hold": one_position(
        {4: 1.0}, realised_logprob_P=np.array([-65505.0])
    ),
    "infinite realised logprob": one_position({4: 1.0}, realised_logprob_P=np.array([-np.inf])),
    "unknown realised logprob": one_position({4: 1.0}, realised_logprob_P=np.array([np.nan])),
    "positive tail": one_position({4: 1.0}, log_tail_mass_P=np.array([0.1])),
    "unknown tail": one_position({4: 1.0}, log_tail_mass_P=np.array([np.nan])),
    "head longer than its entries": one_position({4: 1.0}, num_head_P=np.array([2])),
    "negative head": one_position({4: 1.0}, num_head_P=np.array([-1])),
    "offsets past the entries": one_position({4: 1.0}, offsets_P1=np.array([0, 2])),
    "offsets that fall": one_position(
        {4: 1.0}, offsets_P1=np.array([0, 2, 1]), positions_P=np.arange(2), num_head_P=np.array([1, 0]),
        realised_logprob_P=np.zeros(2), log_tail_mass_P=np.full(2, -np.inf),
    ),
    "arrays of two lengths": one_position({4: 1.0}, realised_logprob_P=np.zeros(2)),
    "too few draws": one_position({4: 0.5}, log_tail_mass_P=np.log([0.5])),
    "threshold out of range": one_position({4: 1.0}, threshold=1 / 300),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_encode_refuses(fault):
    with pytest.raises(FormatError):
        encode_blob([as_document(REFUSED[fault])])


def test_encode_refuses_faulty_draws():
    """A real reduction with its draws spoiled, one rule at a time."""
    target = make_document(6, 4).target
    first, last = int(target.num_head_P[0]), int(target.offsets_P1[1])
    assert last - first >= 2
    swapped, heavy = target.ids_E.copy(), target.weights_E.copy()
    swapped[[first, last - 1]] = swapped[[last - 1, first]]
    heavy[first] *= 1.01
    for spoiled in (replace(target, ids_E=swapped), replace(target, weights_E=heavy)):
        with pytest.raises(FormatError, match="draw"):
            encode_blob([as_document(spoiled)])


def test_encode_refuses_faulty_rows():
    target = one_position({4: 1.0})
    with pytest.raises(FormatError, match="at least one"):
        encode_blob([])
    with pytest.raises(AlignmentError, match="one threshold"):
        encode_blob([as_document(target), as_document(replace(target, threshold=1 / 25))])
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(FormatError, match="entropy sums"):
            encode_blob([as_document(target, final=value)])


def test_repacking_keeps_documents():
    """Documents of two rows encoded again in another order: nothing drifts after the first storing."""
    documents = [make_document(seed, 6) for seed in range(4)]
    stored = decode_blob(encode_blob(documents), positions_of(documents))
    moved = [stored[2], stored[0]]
    again = decode_blob(encode_blob(moved), positions_of(moved))
    for before, after in zip(moved, again, strict=True):
        assert after.content_key == before.content_key
        np.testing.assert_array_equal(after.target.ids_E, before.target.ids_E)
        np.testing.assert_array_equal(after.target.weights_E, before.target.weights_E)
        for name in ("realised_logprob_P", "log_tail_mass_P"):
            np.testing.assert_array_equal(getattr(after.target, name), getattr(before.target, name))


def golden_documents() -> list[DocTarget]:
    sizes = [(5, 2.5), (0, 1.0), (3, 0.0), (7, 5.0)]
    return [make_document(100 + i, size, spread=spread) for i, (size, spread) in enumerate(sizes)]


ARRAYS = (
    *("positions_P", "num_head_P", "offsets_P1", "ids_E", "weights_E"),
    *("realised_logprob_P", "log_tail_mass_P"),
)


def as_arrays(documents: list[DocTarget]) -> dict[str, np.ndarray]:
    arrays = {
        f"{number}.{name}": getattr(document.target, name)
        for number, document in enumerate(documents)
        for name in ARRAYS
    }
    sums = [d.entropy_sums for d in documents]
    arrays["content_keys"] = np.array([d.content_key for d in documents], dtype=np.uint64)
    arrays["entropy_sums"] = np.array([(s.reasoning, s.final, s.control) for s in sums])
    arrays["threshold"] = np.array(documents[0].target.threshold)
    return arrays


def from_arrays(arrays: dict[str, np.ndarray]) -> list[DocTarget]:
    return [
        DocTarget(
            content_key=int(key),
            target=SparseTarget(
                threshold=float(arrays["threshold"]),
                **{name: arrays[f"{number}.{name}"] for name in ARRAYS},
            ),
            entropy_sums=TargetSums(reasoning=sums[0], final=sums[1], control=sums[2]),
        )
        for number, (key, sums) in enumerate(
            zip(arrays["content_keys"].tolist(), arrays["entropy_sums"].tolist(), strict=True)
        )
    ]


def test_golden_blob_decodes_to_its_arrays():
    expected = from_arrays(dict(np.load(GOLDEN / "decoded.npz")))
    found = decode_blob((GOLDEN / "blob.bin").read_bytes(), positions_of(expected))
    assert [d.content_key for d in found] == [d.content_key for d in expected]
    assert [d.entropy_sums for d in found] == [d.entropy_sums for d in expected]
    for before, after in zip(expected, found, strict=True):
        for name in ARRAYS:
            exact = 0 if name != "weights_E" else 1e-6  # exp may round differently between machines
            np.testing.assert_allclose(
                getattr(after.target, name), getattr(before.target, name), rtol=exact
            )


def test_golden_arrays_encode_to_the_golden_payload():
    """zstd's bytes may change between its versions; what they hold may not."""
    documents = from_arrays(dict(np.load(GOLDEN / "reduced.npz")))
    golden = (GOLDEN / "blob.bin").read_bytes()
    found = encode_blob(documents)
    assert found[PREFIX_BYTES:HEADER_BYTES] == golden[PREFIX_BYTES:HEADER_BYTES]
    assert payload_of(found) == payload_of(golden)


def test_golden_targets_are_valid_and_varied():
    documents = from_arrays(dict(np.load(GOLDEN / "reduced.npz")))
    assert all(require_valid(d.target) is not None for d in documents)
    heads = np.concatenate([d.target.num_head_P for d in documents])
    draws = np.concatenate([np.diff(d.target.offsets_P1) - d.target.num_head_P for d in documents])
    assert heads.min() == 0 and heads.max() > 3 and draws.max() >= 50
    assert max(d.target.ids_E.max(initial=0) for d in documents) > 196_608


def write_golden() -> None:
    documents = golden_documents()
    blob = encode_blob(documents)
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "blob.bin").write_bytes(blob)
    np.savez_compressed(GOLDEN / "reduced.npz", **as_arrays(documents))
    decoded = decode_blob(blob, positions_of(documents))
    np.savez_compressed(GOLDEN / "decoded.npz", **as_arrays(decoded))


if __name__ == "__main__":
    write_golden()
