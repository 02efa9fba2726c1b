"""Sparse targets: unbiased, bounded, repeatable, and joined to tokens by content only."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AlignmentError, FormatError
from datastore.target import (
    class_masks,
    concatenate_targets,
    content_key,
    dense_weights,
    entropy_sums,
    position_uniforms,
    reduce_logprobs,
    require_valid,
    row_target,
    target_positions,
)
from datastore.types import DocTarget, PackedRow, SparseTarget, TargetSums

# The worked example of docs/format.md, "The position convention".
EXAMPLE_TOKENS_T = np.array([200007, 200006, 173781, 5000, 200007, 200002, 199999], dtype=np.int32)
EXAMPLE_SPANS_T = np.array([0, 1, 1, 1, 1, 2, 0], dtype=np.uint8)


def splitmix64_stream(seed: int, count: int) -> list[int]:
    """SplitMix64 as published: a state that grows, plain Python integers."""
    mask, state, outputs = (1 << 64) - 1, seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def random_logprobs(
    rng: np.random.Generator, positions: int, vocab: int, spread: float
) -> np.ndarray:
    logits = rng.normal(size=(positions, vocab)) * spread
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def reduce(logprobs_PV: np.ndarray, uniforms_P: np.ndarray, threshold: float) -> SparseTarget:
    positions_P = np.arange(len(logprobs_PV), dtype=np.int32)
    realised_P = np.zeros(len(logprobs_PV), dtype=np.int64)
    return reduce_logprobs(logprobs_PV, realised_P, positions_P, uniforms_P, threshold)


def test_the_reference_stream_is_the_published_one():
    # Outputs for seed 1234567 as listed by Rosetta Code, "Pseudo-random numbers/Splitmix64".
    assert splitmix64_stream(1234567, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("key", [0, 1, 1234567, 0x9E3779B97F4A7C15, 2**63, 2**64 - 1])
def test_uniforms_are_the_top_bits_of_the_stream(key):
    expected = [(x >> 40) / 2**24 for x in splitmix64_stream(key, 3000)]
    assert position_uniforms(key, np.arange(3000, dtype=np.int32)).tolist() == expected
    some = np.array([2999, 0, 17, 17], dtype=np.int32)
    assert position_uniforms(key, some).tolist() == [expected[p] for p in some]


def test_uniforms_fill_the_unit_interval_evenly():
    """64 bins over 2^18 numbers: chi-square of 63 degrees has mean 63, sigma 11.2; 120 is beyond 5 sigma."""
    count = 1 << 18
    uniforms_P = position_uniforms(content_key(np.arange(9)), np.arange(count))
    assert uniforms_P.min() >= 0 and uniforms_P.max() < 1
    found = np.bincount((uniforms_P * 64).astype(int), minlength=64)
    assert ((found - count / 64) ** 2 / (count / 64)).sum() < 120
    neighbours = np.corrcoef(uniforms_P[1:], uniforms_P[:-1])[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(count)


def test_content_key_is_xxh3_of_little_endian_int32():
    tokens = [0, 1, 199999, 201087]
    expected = xxhash.xxh3_64_intdigest(struct.pack("<4i", *tokens))
    for dtype in (np.int32, np.int64, np.uint32, ">i4"):
        assert content_key(np.array(tokens, dtype=dtype)) == expected
    assert content_key(np.array(tokens[::-1], dtype=np.int32)[::-1]) == expected
    assert content_key(np.array(tokens[1:], dtype=np.int32)) != expected


def test_positions_of_the_worked_example():
    positions_P = target_positions(EXAMPLE_TOKENS_T, EXAMPLE_SPANS_T)
    assert positions_P.dtype == np.int32
    assert positions_P.tolist() == [0, 1, 2, 3, 4]
    masks = class_masks(EXAMPLE_TOKENS_T, EXAMPLE_SPANS_T, positions_P)
    assert masks["reasoning"].tolist() == [True, True, True, True, False]
    assert masks["final"].tolist() == [False, False, False, False, True]
    assert masks["control"].tolist() == [True, False, False, True, True]
    entropy_P = np.array([1, 2, 4, 8, 16], dtype=np.float32)
    assert entropy_sums(entropy_P, EXAMPLE_TOKENS_T, EXAMPLE_SPANS_T, positions_P) == TargetSums(
        reasoning=15.0, final=16.0, control=25.0
    )


def test_positions_of_documents_without_targets():
    for length in (0, 1, 5):
        nothing = np.zeros(length, dtype=np.uint8)
        assert target_positions(np.zeros(length, dtype=np.int32), nothing).tolist() == []


def test_positions_refuse_what_nothing_predicts():
    with pytest.raises(FormatError, match="first token"):
        target_positions(np.zeros(2, dtype=np.int32), np.array([1, 1], dtype=np.uint8))
    with pytest.raises(FormatError, match="3 spans"):
        target_positions(np.zeros(2, dtype=np.int32), np.zeros(3, dtype=np.uint8))


@pytest.mark.parametrize("threshold", [1 / 254, 1 / 50, 1 / 10, 1 / 2])
def test_mean_over_the_offset_is_the_distribution(threshold):
    """Averaged over a grid of N offsets, a draw's weight is off by at most its interval's two ends: 2 t / N."""
    grid = 2000
    logprobs_V = random_logprobs(np.random.default_rng(1), 1, 300, 2.0)[0]
    offsets = (np.arange(grid) + 0.5) / grid
    target = reduce(np.tile(logprobs_V, (grid, 1)), offsets, threshold)
    mean_V = dense_weights(target, 300).mean(axis=0)
    assert np.abs(mean_V - np.exp(logprobs_V)).max() <= 2 * threshold / grid + 1e-7


def test_the_numbers_of_positions_draw_without_bias():
    """Over n positions the mean weight of a tail id has variance p (t - p) / n; 300 ids stay within 5 sigma."""
    count, threshold = 20_000, 1 / 50
    logprobs_V = random_logprobs(np.random.default_rng(2), 1, 300, 1.5)[0]
    uniforms_P = position_uniforms(content_key(np.arange(77)), np.arange(count))
    mean_V = np.zeros(300)
    for part in np.split(uniforms_P, 20):
        target = reduce(np.tile(logprobs_V, (len(part), 1)), part, threshold)
        mean_V += dense_weights(target, 300).sum(axis=0) / count
    probs_V = np.exp(logprobs_V)
    sigma_V = np.sqrt(np.maximum(probs_V * (threshold - probs_V), 0) / count)
    assert (probs_V < threshold).sum() > 250
    assert np.all(np.abs(mean_V - probs_V) <= 5 * sigma_V + 1e-7)


def exact_draws(probs: list[Fraction], uniform: Fraction, threshold: Fraction) -> list[int]:
    """The definition word for word, in exact arithmetic: which tail ids hold a point (j + u) t."""
    draws, below, point = [], Fraction(0), uniform * threshold
    for token, prob in enumerate(probs):
        width = prob if prob < threshold else 0
        while point < below + width:
            draws.append(token)
            point += threshold
        below += width
    return draws


@given(
    st.lists(st.integers(1, 400), min_size=2, max_size=60), st.integers(0, 96), st.integers(2, 200)
)
@settings(max_examples=200, deadline=None)
def test_equals_the_definition_in_exact_arithmetic(masses, numerator, inverse):
    threshold = Fraction(1, inverse)
    probs = [Fraction(mass, sum(masses)) for mass in masses]
    uniform = Fraction(
        2 * numerator + 1, 197
    )  # 197 is prime and above any denominator here: no ties
    if any(prob == threshold for prob in probs):
        probs = [*probs[:-1], probs[-1] / 2, probs[-1] / 2]
    logprobs = np.log(np.array([[float(prob) for prob in probs]]))
    target = reduce(logprobs, np.array([float(uniform)]), float(threshold))
    head = sorted((-p, i) for i, p in enumerate(probs) if p >= threshold)
    num_head = int(target.num_head_P[0])
    heads_found = sorted(target.ids_E[:num_head].tolist())
    if not any(p == threshold for p in probs):
        assert heads_found == sorted(i for _, i in head)
        assert target.ids_E[num_head:].tolist() == exact_draws(probs, uniform, threshold)


@given(
    st.integers(0, 2**32),
    st.sampled_from([1 / 254, 1 / 100, 1 / 50, 1 / 25, 1 / 3, 1 / 2]),
    st.sampled_from([0.0, 0.5, 2.0, 5.0]),
    st.sampled_from([0.0, 2.0**-24, 0.5, 1 - 2.0**-24]),
)
@settings(max_examples=100, deadline=None)
def test_reductions_obey_their_rules(seed, threshold, spread, uniform):
    logprobs_PV = random_logprobs(np.random.default_rng(seed), 4, 700, spread)
    target = reduce(logprobs_PV, np.full(4, uniform), threshold)
    in_head_E = require_valid(target)  # distinct ids, sorted, ranges, masses, number of draws
    assert np.diff(target.offsets_P1).max() <= 1 / threshold + 1
    rows_E = np.repeat(np.arange(4), np.diff(target.offsets_P1))
    probs_E = np.exp(logprobs_PV[rows_E, target.ids_E])
    assert np.array_equal(probs_E >= threshold, in_head_E)
    np.testing.assert_allclose(target.weights_E[in_head_E], probs_E[in_head_E], rtol=1e-6)
    assert (np.exp(logprobs_PV) >= threshold).sum() == in_head_E.sum()


def test_ids_as_wide_as_the_threshold_are_drawn_once():
    """Widths of t less one rounding step: two points may both fall inside one; the id is still taken once."""
    width = np.nextafter(1 / 50, 0)
    probs_V = np.append(np.full(49, width), 1 - 49 * width)
    for uniform in (0.0, 0.25, 1 - 2.0**-24):
        target = reduce(np.log(probs_V)[None], np.array([uniform]), 1 / 50)
        assert len(set(target.ids_E.tolist())) == len(target.ids_E) <= 51


def test_a_tiny_tail_keeps_its_digits():
    """A tail of 1e-12: one minus the head would leave four digits of it."""
    probs_V = np.array([1 - 1e-12, 0.75e-12, 0.25e-12])
    target = reduce(np.log(probs_V)[None], np.array([0.5]), 1 / 50)
    assert target.num_head_P.tolist() == [1] and target.ids_E.tolist() == [0]
    assert math.isclose(target.log_tail_mass_P[0], math.log(1e-12), rel_tol=1e-6)


def test_certain_and_uniform_teachers():
    certain = np.array([[-np.inf, 0.0, -np.inf]])
    target = reduce_logprobs(certain, np.array([1]), np.array([4]), np.array([0.0]), 1 / 50)
    assert (target.ids_E.tolist(), target.weights_E.tolist()) == ([1], [1.0])
    assert target.log_tail_mass_P.tolist() == [-np.inf]
    assert target.realised_logprob_P.tolist() == [0.0] and target.entropy_P.tolist() == [0.0]
    flat = np.full((1, 1000), -math.log(1000))
    target = reduce(flat, np.array([0.525]), 1 / 50)
    assert target.num_head_P.tolist() == [0]
    assert target.ids_E.tolist() == list(range(10, 1000, 20))
    assert math.isclose(target.entropy_P[0], math.log(1000), rel_tol=1e-6)
    assert abs(target.log_tail_mass_P[0]) < 1e-6


def test_logprobs_that_are_no_distribution_are_refused():
    logprobs_PV = random_logprobs(np.random.default_rng(3), 2, 50, 1.0)
    logprobs_PV[1] += 0.01
    with pytest.raises(FormatError, match=r"position 1 .*total mass 1\.01"):
        reduce(logprobs_PV, np.zeros(2), 1 / 50)
    logprobs_PV[1, 0] = np.nan
    with pytest.raises(FormatError, match="position 1 "):
        reduce(logprobs_PV, np.zeros(2), 1 / 50)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1 / 255, 0.51, 1.0, math.nan, math.inf])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(FormatError, match="threshold"):
        reduce(np.log(np.full((1, 4), 0.25)), np.zeros(1), threshold)


@pytest.fixture
def row_and_documents() -> tuple[PackedRow, list[DocTarget]]:
    """The worked example, then a shorter document, then padding; made of random teachers."""
    rng = np.random.default_rng(4)
    second_tokens_T = np.array([200007, 200006, 7, 199999], dtype=np.int32)
    second_spans_T = np.array([0, 2, 2, 0], dtype=np.uint8)
    padding = 3
    row = PackedRow(
        tokens_T=np.concatenate(
            [EXAMPLE_TOKENS_T, second_tokens_T, np.full(padding, 199999)]
        ).astype(np.int32),
        spans_T=np.concatenate([EXAMPLE_SPANS_T, second_spans_T, np.zeros(padding, np.uint8)]),
        doc_ends_D=np.array([7, 11], dtype=np.int32),
        doc_ids=(b"a" * 16, b"b" * 16),
        languages=("en", ""),
        exercises=("", "rag"),
        row_hash=0,
    )
    documents = []
    for tokens_T, spans_T in (
        (EXAMPLE_TOKENS_T, EXAMPLE_SPANS_T),
        (second_tokens_T, second_spans_T),
    ):
        positions_P = target_positions(tokens_T, spans_T)
        target = reduce_logprobs(
            random_logprobs(rng, len(positions_P), 300, 2.0),
            np.zeros(len(positions_P), dtype=np.int64),
            positions_P,
            position_uniforms(content_key(tokens_T), positions_P),
            1 / 50,
        )
        sums = entropy_sums(target.entropy_P, tokens_T, spans_T, positions_P)
        documents.append(
            DocTarget(content_key=content_key(tokens_T), target=target, entropy_sums=sums)
        )
    return row, documents


def test_row_target_moves_documents_to_the_row(row_and_documents):
    row, documents = row_and_documents
    joined = row_target(documents, row)
    assert joined.positions_P.tolist() == [0, 1, 2, 3, 4, 7, 8]
    dense = [dense_weights(document.target, 300) for document in documents]
    np.testing.assert_array_equal(dense_weights(joined, 300), np.concatenate(dense))
    assert joined.entropy_P.shape == (7,)
    assert np.all(row.spans_T[joined.positions_P + 1] != 0)


def test_row_target_refuses_other_content(row_and_documents):
    row, documents = row_and_documents
    with pytest.raises(AlignmentError, match=r"document 0 .*other tokens"):
        row_target(documents[::-1], row)
    with pytest.raises(AlignmentError, match="1 documents"):
        row_target(documents[:1], row)
    for at in (0, 3, 6):
        tokens_T = row.tokens_T.copy()
        tokens_T[at] ^= 1
        with pytest.raises(AlignmentError, match=r"document 0 .*other tokens"):
            row_target(documents, replace(row, tokens_T=tokens_T))


@pytest.mark.parametrize("scored", [0, 1])
def test_row_target_joins_the_scored_documents_alone(row_and_documents, scored):
    row, documents = row_and_documents
    part = row_target([d if n == scored else None for n, d in enumerate(documents)], row)
    where = row.documents()[scored]
    own = documents[scored].target
    assert part.positions_P.tolist() == (own.positions_P + where.start).tolist()
    np.testing.assert_array_equal(dense_weights(part, 300), dense_weights(own, 300))
    np.testing.assert_array_equal(part.entropy_P, own.entropy_P)


def test_row_target_refuses_a_row_without_any_scored_document(row_and_documents):
    row, documents = row_and_documents
    with pytest.raises(AlignmentError, match="no document was scored"):
        row_target([None, None], row)
    with pytest.raises(AlignmentError, match="1 documents"):
        row_target([None], row)
    with pytest.raises(AlignmentError, match=r"document 1 .*other tokens"):
        row_target([None, documents[0]], row)


def test_row_target_refuses_other_positions(row_and_documents):
    row, documents = row_and_documents
    spans_T = row.spans_T.copy()
    spans_T[1] = 0
    with pytest.raises(AlignmentError, match=r"document 0 .*other positions"):
        row_target(documents, replace(row, spans_T=spans_T))
    late = replace(documents[1].target, positions_P=documents[1].target.positions_P + 1)
    with pytest.raises(AlignmentError, match=r"document 1 .*other positions"):
        row_target([documents[0], replace(documents[1], target=late)], row)


def test_targets_of_two_thresholds_do_not_join(row_and_documents):
    target = row_and_documents[1][0].target
    with pytest.raises(AlignmentError, match="one threshold"):
        concatenate_targets(
            [target, replace(target, threshold=1 / 25)], [target.positions_P, target.positions_P]
        )
