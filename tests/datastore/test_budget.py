"""The error budget: means against figures known beforehand, sums that merge, limits that refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from common.errors import AlignmentError, FormatError
from datastore.budget import (
    Budget,
    BudgetLimits,
    BudgetSums,
    ClassSums,
    quantisation_kl,
    require_budget,
    require_shard_budget,
    row_budget,
)
from datastore.codec import decode_blob, encode_blob
from datastore.id_order import IdOrder
from datastore.target import (
    content_key,
    entropy_sums,
    position_uniforms,
    reduce_logprobs,
    target_positions,
)
from datastore.types import DocTarget, PackedRow, SparseTarget

ORDER = IdOrder.identity()
REASONING_TOKENS = np.array(
    [200007, 200006, 11, 12, 13, 200007, 14, 200002, 199999], dtype=np.int32
)
SPANS = np.array([0, 1, 1, 1, 1, 1, 2, 2, 0], dtype=np.uint8)


def make_row(copies: int, first: int) -> PackedRow:
    """Documents that differ in one token, end to end, with padding."""
    documents = [REASONING_TOKENS.copy() for _ in range(copies)]
    for number, tokens_T in enumerate(documents):
        tokens_T[2] = first + number
    length = len(REASONING_TOKENS)
    return PackedRow(
        tokens_T=np.concatenate([*documents, np.full(5, 199999, dtype=np.int32)]),
        spans_T=np.concatenate([np.tile(SPANS, copies), np.zeros(5, dtype=np.uint8)]),
        doc_ends_D=np.arange(1, copies + 1, dtype=np.int32) * length,
        doc_ids=tuple(bytes([n]) * 16 for n in range(copies)),
        languages=("",) * copies,
        exercises=("",) * copies,
        row_hash=0,
    )


def score(row: PackedRow, logprobs_V: np.ndarray, threshold: float = 1 / 50) -> list[DocTarget]:
    """A teacher that says the same at every position, of the token that follows (first) and of other ids."""
    documents = []
    for where in row.documents():
        tokens_T, spans_T = row.tokens_T[where], row.spans_T[where]
        positions_P = target_positions(tokens_T, spans_T)
        key = content_key(tokens_T)
        target = reduce_logprobs(
            np.tile(logprobs_V, (len(positions_P), 1)),
            np.zeros(len(positions_P), dtype=np.int64),
            positions_P,
            position_uniforms(key, positions_P),
            threshold,
        )
        following_E = np.repeat(tokens_T[positions_P + 1], np.diff(target.offsets_P1))
        ids_E = np.where(target.ids_E == 0, following_E, target.ids_E + 100_000)
        target = replace(target, ids_E=ids_E.astype(np.int32))
        sums = entropy_sums(target.entropy_P, tokens_T, spans_T, positions_P)
        documents.append(DocTarget(content_key=key, target=target, entropy_sums=sums))
    return documents


HALF_HEAD = np.log(np.array([0.5, *[0.5 / 400] * 400]))


def test_figures_of_a_teacher_known_by_heart():
    """Half the mass on one id, half on 400 ids below the threshold: entropy ln 2 / 2 + ln 800 / 2, 26 entries."""
    row = make_row(2, 500)
    documents = score(row, HALF_HEAD)
    blob = encode_blob(documents, row, ORDER)
    budget = row_budget(documents, blob, row, ORDER).budget()
    assert budget.positions == 14
    assert budget.bytes_per_token == len(blob) / 14
    counts = (budget.reasoning.positions, budget.final.positions, budget.control.positions)
    assert counts == (10, 4, 6)
    for span in (budget.reasoning, budget.final, budget.control):
        assert math.isclose(span.head_mass, 0.5, rel_tol=1e-6)
        assert math.isclose(span.tail_mass, 0.5, rel_tol=1e-6)
        assert math.isclose(span.realised_logprob, math.log(0.5), rel_tol=1e-6)
        assert math.isclose(span.entropy, math.log(2) / 2 + math.log(800) / 2, rel_tol=1e-6)
        assert span.entries == 26
        assert 0 <= span.kl_mean <= span.kl_max <= 4e-4


def test_sums_merge_as_json_like_one_pass():
    rows = [make_row(copies, 100 * copies) for copies in (1, 2, 3)]
    parts = [score(row, HALF_HEAD) for row in rows]
    sums = [
        row_budget(d, encode_blob(d, row, ORDER), row, ORDER)
        for d, row in zip(parts, rows, strict=True)
    ]
    total = BudgetSums()
    for part in sums:
        total = total.merged(BudgetSums.model_validate(json.loads(part.model_dump_json())))
    again = BudgetSums()
    for part in sums:
        again = again.merged(part)
    assert total == again
    assert total.budget().positions == 6 * 7
    assert total.budget().reasoning.positions == 30
    assert math.isclose(total.budget().final.head_mass, 0.5, rel_tol=1e-6)
    assert total.reasoning.kl_max == max(part.reasoning.kl_max for part in sums)
    assert total.blob_bytes == sum(part.blob_bytes for part in sums)


def test_a_class_without_positions_is_null():
    row = make_row(1, 5)
    spans_T = np.where(row.spans_T == 2, 0, row.spans_T).astype(np.uint8)
    row = replace(row, spans_T=spans_T)
    documents = score(row, HALF_HEAD)
    budget = row_budget(documents, encode_blob(documents, row, ORDER), row, ORDER).budget()
    assert budget.final is None and budget.reasoning.positions == 5
    assert require_budget(json.loads(budget.model_dump_json()), BudgetLimits(), {}) == budget


def random_targets(threshold: float, positions: int, spread: float) -> SparseTarget:
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(positions, 400)) * spread
    logprobs_PV = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    positions_P = np.arange(positions, dtype=np.int32)
    uniforms_P = position_uniforms(1, positions_P)
    return reduce_logprobs(
        logprobs_PV, np.zeros(positions, int), positions_P, uniforms_P, threshold
    )


@pytest.mark.parametrize("threshold", [1 / 254, 1 / 100, 1 / 50, 1 / 10])
@pytest.mark.parametrize("spread", [0.5, 2.5, 8.0])
def test_quantisation_kl_is_within_its_bound(threshold, spread):
    """Within the limit that a run accepts, and in the mean what the steps of the format say."""
    exact = random_targets(threshold, 500, spread)
    sums = entropy_sums(
        exact.entropy_P,
        np.zeros(501, dtype=np.int32),
        np.ones(501, dtype=np.uint8),
        exact.positions_P,
    )
    document = DocTarget(content_key=1, target=exact, entropy_sums=sums)
    row = PackedRow(
        tokens_T=np.zeros(501, dtype=np.int32),
        spans_T=np.array([0, *[1] * 500], dtype=np.uint8),
        doc_ends_D=np.array([501], dtype=np.int32),
        doc_ids=(bytes(16),),
        languages=("",),
        exercises=("",),
        row_hash=0,
    )
    stored = decode_blob(encode_blob([document], row, ORDER), row, ORDER)[0].target
    kl_P = quantisation_kl(exact, stored)
    assert kl_P.min() >= -1e-12
    assert kl_P.max() <= BudgetLimits().max_quantisation_kl
    # Steps of 1/16 nat cost 1/24 of their square in the mean, a tail cell of t about t/400 more.
    assert kl_P.mean() <= 1 / 24 / 16**2 + threshold / 400


def test_quantisation_kl_of_known_masses():
    """Head 0.8 stored as 0.4, tail 0.2 stored as 0.2: 0.8 ln 2 - 0.8 + 0.4 nats."""
    exact = SparseTarget(
        threshold=0.5,
        positions_P=np.array([0, 1], dtype=np.int32),
        num_head_P=np.array([1, 0], dtype=np.int32),
        offsets_P1=np.array([0, 1, 2], dtype=np.int64),
        ids_E=np.array([3, 4], dtype=np.int32),
        weights_E=np.array([0.8, 0.5], dtype=np.float32),
        realised_logprob_P=np.zeros(2, dtype=np.float32),
        log_tail_mass_P=np.array([math.log(0.2), 0.0], dtype=np.float32),
    )
    stored = replace(exact, weights_E=np.array([0.4, 0.5], dtype=np.float32))
    expected = [0.8 * math.log(2) - 0.4, 0.0]
    np.testing.assert_allclose(quantisation_kl(exact, stored), expected, atol=1e-7)
    empty = replace(exact, log_tail_mass_P=np.full(2, -np.inf, dtype=np.float32))
    np.testing.assert_allclose(
        quantisation_kl(empty, replace(empty, weights_E=stored.weights_E)), expected, atol=1e-7
    )


def test_other_ids_than_the_reduction_are_refused():
    exact = random_targets(1 / 50, 4, 2.0)
    with pytest.raises(FormatError, match="other ids"):
        quantisation_kl(exact, replace(exact, ids_E=exact.ids_E + 1))


def test_blobs_of_other_rows_and_bad_reductions_are_refused():
    row, other = make_row(2, 500), make_row(2, 900)
    documents, foreign = score(row, HALF_HEAD), score(other, HALF_HEAD)
    with pytest.raises(AlignmentError, match="other tokens"):
        row_budget(documents, encode_blob(foreign, other, ORDER), row, ORDER)
    with pytest.raises(AlignmentError, match="other tokens"):
        row_budget(foreign, encode_blob(documents, row, ORDER), row, ORDER)
    target = documents[0].target
    heavier = np.where(target.weights_E > 0.4, 0.505, target.weights_E).astype(np.float32)
    loose = [replace(documents[0], target=replace(target, weights_E=heavier)), documents[1]]
    with pytest.raises(FormatError, match="add up"):
        row_budget(loose, encode_blob(loose, row, ORDER), row, ORDER)


def known_budget(**changes: object) -> dict:
    span = {
        **{"positions": 10, "entries": 12.0, "head_mass": 0.8, "tail_mass": 0.2},
        **{"kl_mean": 1e-5, "kl_max": 1e-4, "realised_logprob": -1.0, "entropy": 1.0},
    }
    budget = {"positions": 20, "bytes_per_token": 40.0, "reasoning": span, "final": span}
    return {**budget, "control": None, **changes}


def test_a_budget_within_limits_passes():
    assert require_budget(known_budget(), BudgetLimits(), {}) == Budget(**known_budget())


@pytest.mark.parametrize(
    ("figure", "value", "message"),
    [
        ("head_mass", 0.1, "final head mass 0.1 .limit 0.3"),
        ("kl_max", 0.01, "final KL 0.01"),
        ("realised_logprob", -9.0, "final realised logprob -9"),
        ("entries", 90.0, "final entries 90"),
        ("head_mass", math.nan, "final head mass nan"),
    ],
)
def test_figures_outside_the_limits_are_refused(figure, value, message):
    final = {**known_budget()["final"], figure: value}
    with pytest.raises(AlignmentError, match=message):
        require_budget(known_budget(final=final), BudgetLimits(), {})
    with pytest.raises(AlignmentError, match=message.replace("final", "reasoning")):
        require_budget(known_budget(reasoning=final), BudgetLimits(), {})


def test_no_budget_is_no_licence():
    empty = known_budget(positions=0, reasoning=None, final=None)
    with pytest.raises(AlignmentError, match="nothing"):
        require_budget(empty, BudgetLimits(), {})
    with pytest.raises(FormatError, match="error budget"):
        require_budget({}, BudgetLimits(), {})
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        BudgetLimits(min_head_mass=2.0)


def garbage(positions: int) -> BudgetSums:
    """A shard of an engine that returned flat logits: guessing among 201,088 ids, nothing in the head."""
    figures = {"positions": positions, "entries": 50 * positions, "tail_mass": 1.0 * positions}
    figures |= {"realised_logprob": -12.2 * positions, "entropy": 12.2 * positions}
    return BudgetSums(positions=positions, reasoning=ClassSums(**figures))


def test_one_bad_shard_is_refused_though_the_whole_is_within_limits():
    good = known_budget(positions=2000)
    shards = {"train": [good, good, garbage(200).budget().resolved()], "valid": [good]}
    with pytest.raises(AlignmentError, match=r"train shard 2 .*head mass 0 .*logprob -12\.2"):
        require_budget(known_budget(), BudgetLimits(), shards)
    require_budget(known_budget(), BudgetLimits(), {"train": [good, good], "valid": [good]})
    with pytest.raises(FormatError, match="valid shard 0"):
        require_budget(known_budget(), BudgetLimits(), {"valid": [{"positions": 3}]})


def test_a_shard_is_refused_when_it_is_scored():
    with pytest.raises(AlignmentError, match=r"train/shard-00007\.arrow .*head mass 0"):
        require_shard_budget(garbage(100), BudgetLimits(), "train/shard-00007.arrow")
    lenient = BudgetLimits(min_head_mass=0, min_realised_logprob=-13)
    require_shard_budget(garbage(100), lenient, "a shard")


def test_few_or_no_positions_of_a_shard_are_no_sign():
    require_shard_budget(BudgetSums(), BudgetLimits(), "an unscored shard")
    require_shard_budget(garbage(99), BudgetLimits(), "a shard of a small pilot")


def test_a_row_scored_in_part_counts_its_scored_documents():
    row = make_row(3, 500)
    documents = score(row, HALF_HEAD)
    whole = row_budget(documents, encode_blob(documents, row, ORDER), row, ORDER)
    partial = [documents[0], None, documents[2]]
    blob = encode_blob(partial, row, ORDER)
    sums = row_budget(partial, blob, row, ORDER)
    assert (whole.positions, sums.positions) == (21, 14)
    assert (sums.reasoning.positions, sums.final.positions, sums.control.positions) == (10, 4, 6)
    assert sums.blob_bytes == len(blob)
    assert math.isclose(sums.budget().final.head_mass, 0.5, rel_tol=1e-6)
