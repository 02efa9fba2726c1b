"""The device reduction against the float64 reference of datastore/target.py, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datastore.packed import most_heads, packed_width, unpack
from datastore.reduce import VocabShard, reduce_hidden
from datastore.target import dense_weights, reduce_logprobs, require_valid
from datastore.types import SparseTarget

ROWS = 10
# fp32 sums over 201,088 ids: cumulative masses are off by about 1e-6.
MASS_ERROR = 5e-6


def reduced(hidden, head, realised, uniforms, threshold: float, chunk: int = 4) -> SparseTarget:
    packed = reduce_hidden(
        *(hidden, head, realised, uniforms), threshold=threshold, chunk=chunk, shard=VocabShard()
    )
    assert packed.shape == (len(hidden), packed_width(threshold))
    return unpack(packed.numpy(), np.arange(len(hidden)), threshold)


def problem(vocab: int, scale: float, rows: int = ROWS):
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(rows, 64, generator=generator)
    head = torch.randn(vocab, 64, generator=generator) * scale / 8
    realised = torch.randint(0, vocab, (rows,), generator=generator)
    uniforms = torch.randint(0, 1 << 24, (rows,), generator=generator).double() / 2**24
    return hidden, head, realised, uniforms


def assert_draws_fit(target: SparseTarget, logprobs_PV: np.ndarray, uniforms_P: np.ndarray) -> None:
    """Draw number j holds the point (j + u) t in its interval of the tail's exact cumulative mass."""
    for row, probs_V in enumerate(np.exp(logprobs_PV)):
        ids = target.ids_E[target.offsets_P1[row] : target.offsets_P1[row + 1]]
        head, draws = np.split(ids, [target.num_head_P[row]])
        tail_V = probs_V.copy()
        tail_V[head] = 0
        ends_V = tail_V.cumsum()
        points = (np.arange(len(draws)) + uniforms_P[row]) * target.threshold
        assert (ends_V[draws] - tail_V[draws] <= points + MASS_ERROR).all()
        assert (points < ends_V[draws] + MASS_ERROR).all()


@pytest.mark.parametrize("threshold", [1 / 50, 0.03, 1 / 2])
@pytest.mark.parametrize("scale", [0.1, 3.0, 8.0])
@pytest.mark.parametrize("vocab", [96, 1000, 201_088])
def test_equals_the_reference(vocab: int, scale: float, threshold: float) -> None:
    hidden, head, realised, uniforms = problem(vocab, scale)
    target = reduced(hidden, head, realised, uniforms, threshold)
    logprobs = (hidden.double() @ head.double().T).log_softmax(-1).numpy()
    expected = reduce_logprobs(
        logprobs, realised.numpy(), np.arange(ROWS), uniforms.numpy(), threshold
    )
    require_valid(target)
    np.testing.assert_array_equal(target.num_head_P, expected.num_head_P)
    np.testing.assert_array_equal(target.offsets_P1, expected.offsets_P1)
    for row in range(ROWS):
        start, heads = expected.offsets_P1[row], expected.num_head_P[row]
        mine, theirs = (t.ids_E[start : start + heads] for t in (target, expected))
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(target.weights_E, expected.weights_E, rtol=1e-4)
    np.testing.assert_allclose(target.realised_logprob_P, expected.realised_logprob_P, atol=2e-5)
    np.testing.assert_allclose(
        np.exp(target.log_tail_mass_P), np.exp(expected.log_tail_mass_P), atol=MASS_ERROR
    )
    np.testing.assert_allclose(target.entropy_P, expected.entropy_P, atol=1e-4)
    assert_draws_fit(target, logprobs, uniforms.numpy())


def test_chunks_do_not_change_the_result() -> None:
    values = problem(5000, 4.0, rows=23)
    one, many = (reduced(*values, 1 / 50, chunk=chunk) for chunk in (64, 5))
    np.testing.assert_array_equal(one.ids_E, many.ids_E)
    np.testing.assert_allclose(one.realised_logprob_P, many.realised_logprob_P, atol=1e-5)


def test_equal_probabilities_stand_in_order_of_id() -> None:
    hidden, head = torch.ones(1, 4), torch.zeros(512, 4)
    head[[400, 7, 130, 129]] = 2.0
    target = reduced(hidden, head, torch.tensor([7]), torch.tensor([0.5]).double(), 1 / 50)
    assert target.ids_E[: target.num_head_P[0]].tolist() == [7, 129, 130, 400]


def test_one_certain_id_leaves_no_draws() -> None:
    hidden, head = torch.full((1, 4), 10.0), torch.zeros(512, 4)
    head[300] = 10.0
    target = reduced(hidden, head, torch.tensor([1]), torch.tensor([0.25]).double(), 1 / 50)
    assert target.ids_E.tolist() == [300]
    assert target.weights_E[0] == 1.0
    assert target.realised_logprob_P[0] == pytest.approx(-400, abs=1e-3)


def test_a_flat_teacher_takes_one_draw_a_step() -> None:
    hidden, head = torch.ones(1, 4), torch.zeros(201_088, 4)
    target = reduced(hidden, head, torch.tensor([0]), torch.tensor([0.5]).double(), 1 / 50)
    expected = (np.arange(50) + 0.5) / 50 * 201_088
    assert target.num_head_P[0] == 0
    assert np.abs(target.ids_E - expected).max() <= 2


def test_weights_have_the_teachers_expectation() -> None:
    """Over a grid of n offsets u the mean weight of an id differs from its probability by at most 2 t / n."""
    offsets, threshold = 500, 1 / 10
    hidden, head, realised, _ = problem(256, 2.0, rows=1)
    uniforms = (torch.arange(offsets).double() + 0.5) / offsets
    target = reduced(
        *(hidden.repeat(offsets, 1), head, realised.repeat(offsets), uniforms), threshold
    )
    probs = (hidden.double() @ head.double().T).softmax(-1).numpy()[0]
    mean = dense_weights(target, 256).mean(axis=0)
    np.testing.assert_allclose(mean, probs, atol=2 * threshold / offsets)


@pytest.mark.parametrize("threshold", [1 / 255, 1 / 50, 0.03, 1 / 3, 1 / 2])
def test_no_distribution_has_more_heads_than_the_bound(threshold: float) -> None:
    most = most_heads(threshold)
    assert most * threshold <= 1 + 1e-9 < (most + 1) * threshold
