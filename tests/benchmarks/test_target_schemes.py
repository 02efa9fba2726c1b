"""The schemes of the fidelity benchmark: unbiased where they claim it, the gradients those of their losses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.smollm import SEQ_LEN, Teacher, spread_ids
from benchmarks.target_bytes import formula_bytes, restored, stored
from benchmarks.target_schemes import (
    IID,
    POLYNOMIAL,
    SCHEMES,
    TOP_K,
    Chunk,
    Entries,
    independent,
    polynomial,
    systematic,
    target_entries,
    threshold_target,
    top_k,
)
from benchmarks.target_students import Student, _full_distillation, _ghost, judge
from common.tokenizer import VOCAB_SIZE
from datastore.target import content_key, reduce_logprobs, target_positions
from datastore.types import RenderedDoc

VOCAB, POSITIONS, SEEDS = 120, 12, 1000


@pytest.fixture(scope="module")
def chunk() -> Chunk:
    """Distributions from flat to peaked; the realised ids are any."""
    rng = np.random.default_rng(3)
    logits_CV = rng.normal(size=(POSITIONS, VOCAB)) * np.linspace(0.5, 6, POSITIONS)[:, None]
    return Chunk(
        probs_CV=torch.from_numpy(logits_CV).softmax(dim=1),
        positions_C=np.arange(5, 5 + POSITIONS, dtype=np.int32),
        realised_C=rng.integers(0, VOCAB, POSITIONS),
        keys=tuple(2**63 + 12345 * seed for seed in range(SEEDS)),
    )


def dense(entries: Entries) -> np.ndarray:
    weights_CV = np.zeros((POSITIONS, VOCAB))
    places = (entries.rows_E.numpy(), entries.columns_E.numpy())
    np.add.at(weights_CV, places, entries.weights_E.double().numpy())
    return weights_CV


@pytest.mark.parametrize("threshold", [1 / 5, 1 / 25, 1 / 100])
@pytest.mark.parametrize("seed", [0, 2])
def test_our_target_is_what_the_store_reduces_to(chunk: Chunk, threshold: float, seed: int) -> None:
    mine = threshold_target(chunk, (seed,), threshold)[0]
    theirs = reduce_logprobs(
        chunk.probs_CV.log().numpy(),
        chunk.realised_C,
        chunk.positions_C,
        chunk.uniforms(seed).numpy(),
        threshold,
    )
    for name in ("positions_P", "num_head_P", "offsets_P1", "ids_E"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), err_msg=name)
    for name in ("weights_E", "realised_logprob_P", "log_tail_mass_P", "entropy_P"):
        np.testing.assert_allclose(
            getattr(mine, name), getattr(theirs, name), rtol=1e-5, atol=1e-6, err_msg=name
        )


def ours(chunk: Chunk, seed: int, size: int) -> Entries:
    return target_entries(chunk, threshold_target(chunk, (seed,), 1 / size)[0])


@pytest.mark.parametrize(("draw", "size"), [(ours, 8), (systematic, 8), (independent, 8)])
def test_a_scheme_that_draws_is_unbiased(chunk: Chunk, draw, size: int) -> None:
    """The mean over many seeds is the distribution, to five standard errors of an independent draw at each id."""
    mean_CV = sum(dense(draw(chunk, seed, size)) for seed in range(SEEDS)) / SEEDS
    probs_CV = chunk.probs_CV.numpy()
    # an id's weight varies by at most sqrt(p / n); rare ids get the room of three hits
    room_CV = 5 * np.sqrt(probs_CV / size / SEEDS) + 3 / size / SEEDS
    assert (np.abs(mean_CV - probs_CV) <= room_CV).all()


@pytest.mark.parametrize("draw", [top_k, polynomial])
def test_top_k_holds_the_largest_and_sums_to_one(chunk: Chunk, draw) -> None:
    weights_CV = dense(draw(chunk, 0, 10))
    largest_CV = chunk.probs_CV.argsort(dim=1, descending=True)[:, :10].sort(dim=1).values
    np.testing.assert_array_equal(
        np.stack([np.flatnonzero(row_V) for row_V in weights_CV]), largest_CV.numpy()
    )
    np.testing.assert_allclose(weights_CV.sum(axis=1), 1, rtol=1e-6)


def test_the_ghost_gradient_is_that_of_its_loss() -> None:
    rng = torch.Generator().manual_seed(0)
    logp_CV = torch.randn(6, 40, generator=rng, dtype=torch.float64).mul(2).log_softmax(dim=1)
    logits_CV = torch.randn(6, 40, generator=rng, dtype=torch.float64, requires_grad=True)
    logq_CV = logits_CV.log_softmax(dim=1)
    top_CK = logp_CV.topk(7, dim=1).indices
    p_CK, logq_CK = logp_CV.exp().gather(1, top_CK), logq_CV.gather(1, top_CK)
    rest_C = 1 - p_CK.sum(dim=1)
    (-(p_CK * logq_CK).sum() - (rest_C * (1 - logq_CK.exp().sum(dim=1)).log()).sum()).backward()
    grad_CV, _ = _ghost(logp_CV, logq_CV.detach(), 7)
    torch.testing.assert_close(grad_CV, logits_CV.grad)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """A small teacher of two documents over real ids."""
    rng = np.random.default_rng(5)
    ids_V = np.sort(rng.choice(VOCAB_SIZE, VOCAB, replace=False)).astype(np.int32)
    documents = []
    for number, length in enumerate((30, 41)):
        spans_T = np.repeat(np.array([0, 1, 2], np.uint8), [5, 10, length - 15])
        documents.append(
            RenderedDoc(
                doc_id=bytes([number] * 16),
                tokens_T=rng.choice(ids_V, length),
                spans_T=spans_T,
                language="",
                exercise="",
            )
        )
    num_targets = sum(len(target_positions(d.tokens_T, d.spans_T)) for d in documents)
    return Teacher(
        documents=tuple(documents),
        hidden_PD=rng.normal(size=(num_targets, 16)).astype(np.float32),
        head_VD=rng.normal(size=(VOCAB, 16)).astype(np.float32),
        ids_V=ids_V,
        counts_W=np.bincount(rng.choice(ids_V, 5000), minlength=VOCAB_SIZE),
    )


def test_full_distillation_is_the_gradient_of_the_kl(teacher: Teacher) -> None:
    student = Student(name="any", hidden_noise=0.4, head_noise=0.2, temperature=1.2)
    exact = _full_distillation(student, teacher)
    hidden_PD, head_VD = (weights.double() for weights in student.weights(teacher))
    head_VD.requires_grad_()
    logits_PV = torch.from_numpy(teacher.hidden_PD @ teacher.head_VD.T).double()
    logp_PV, logq_PV = logits_PV.log_softmax(dim=1), (hidden_PD @ head_VD.T).log_softmax(dim=1)
    kl_P = (logp_PV.exp() * (logp_PV - logq_PV)).sum(dim=1)
    kl_P.sum().backward()
    torch.testing.assert_close(exact.grad_VD.double(), head_VD.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exact.kl_P.double(), kl_P.detach(), rtol=1e-4, atol=1e-5)


def all_chunks(teacher: Teacher) -> list[Chunk]:
    chunks, first = [], 0
    for document, positions_P in zip(teacher.documents, teacher.positions(), strict=True):
        hidden_PD = teacher.hidden_PD[first : first + len(positions_P)]
        first += len(positions_P)
        chunks.append(
            Chunk(
                probs_CV=torch.from_numpy(hidden_PD @ teacher.head_VD.T).double().softmax(dim=1),
                positions_C=positions_P,
                realised_C=np.searchsorted(teacher.ids_V, document.tokens_T[positions_P + 1]),
                keys=(content_key(document.tokens_T),),
            )
        )
    return chunks


def test_a_target_of_every_id_has_no_error(teacher: Teacher) -> None:
    student = Student(name="any", hidden_noise=0.4)
    firsts = np.cumsum([0] + [len(at) for at in teacher.positions()])
    parts = [
        (int(first), top_k(chunk, 0, VOCAB))
        for first, chunk in zip(firsts, all_chunks(teacher), strict=False)
    ]
    figures = judge(
        Entries.joined(parts), _full_distillation(student, teacher), *student.weights(teacher)
    )
    for name in ("error", "body_error", "kl_rms", "kl_mean"):
        assert abs(figures[name]) < 1e-5, name


def test_stored_targets_come_back_with_their_ids(teacher: Teacher) -> None:
    chunks = all_chunks(teacher)
    targets = [threshold_target(chunk, (0,), 1 / 25)[0] for chunk in chunks]
    firsts = (0, len(targets[0].positions_P))
    entries = Entries.joined(
        [(first, target_entries(c, t)) for first, c, t in zip(firsts, chunks, targets, strict=True)]
    )
    num_bytes, decoded = stored(teacher, targets)
    back = restored(entries, decoded)
    assert num_bytes > 0
    torch.testing.assert_close(back.weights_E, entries.weights_E, rtol=0.05, atol=0)
    shifted = dataclasses.replace(entries, columns_E=(entries.columns_E + 1) % VOCAB)
    with pytest.raises(ValueError, match="other entries"):
        restored(shifted, decoded)


def test_published_sizes() -> None:
    """12 distinct draws of 50 are 36 bytes (arXiv 2503.16870); DistillKit's k = 50 is 127 at 18-bit ids."""
    twelve = torch.zeros(12)
    entries = Entries(
        rows_E=twelve, columns_E=twelve, weights_E=twelve, probs_E=twelve, counts_E=twelve
    )
    assert formula_bytes(IID, 50, entries, 1) == 36
    assert formula_bytes(POLYNOMIAL, 50, entries, 1) == 127
    assert formula_bytes(TOP_K, 12, entries, 1) == 12 * 34 / 8


def test_ids_are_spread_without_collision() -> None:
    ids_V = spread_ids()
    assert len(np.unique(ids_V)) == len(ids_V) == 49_152
    assert ids_V.min() >= 0 and ids_V.max() < VOCAB_SIZE
    assert {scheme.family for scheme in SCHEMES} >= {IID, POLYNOMIAL, TOP_K}
    assert SEQ_LEN == 2048
