"""Batches: the position convention, document borders, and targets joined to the positions they score."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AlignmentError
from common.tokenizer import END, ENDOFTEXT, PAD, START
from datastore.rollout import ScoredTokens
from datastore.target import dense_weights
from datastore.types import DocTarget
from tests.trainer.packed import pack, random_document, random_logprobs, random_row, score
from trainer.batch import make_batch

VOCAB = 97
SHAPES = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_worked_example_of_the_format() -> None:
    tokens = np.array([END, START, 500, 501, END, START, 502, ENDOFTEXT], dtype=np.int32)
    spans = np.array([0, 1, 1, 1, 1, 2, 2, 0], dtype=np.uint8)
    batch = make_batch([pack([(tokens, spans)], 10)])
    assert batch.labels_BT[0, :7].tolist() == [START, 500, 501, END, START, 502, ENDOFTEXT]
    assert batch.label_spans_BT[0].tolist() == [1, 1, 1, 1, 2, 2, 0, 0, 0, 0]
    assert batch.is_control_BT[0].tolist() == [True, False, False, True, True, *[False] * 5]
    assert batch.target_index_N.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.doc_ids_BT[0].tolist() == [0] * 8 + [-1, -1]
    assert batch.labels_BT[0, 7:].tolist() == [PAD] * 3


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(SHAPES, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_labels_never_cross_a_document(rows: list[list[tuple[int, int, int]]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents = [[random_document(rng, *shape, vocab=VOCAB) for shape in row] for row in rows]
    seq_len = max(sum(len(tokens) for tokens, _ in row) for row in documents) + seed % 3
    batch = make_batch([pack(row, seq_len) for row in documents])
    for b, row in enumerate(documents):
        labels, spans, ids = [], [], []
        for number, (tokens_T, spans_T) in enumerate(row):
            labels += [*tokens_T[1:].tolist(), PAD]
            spans += [*spans_T[1:].tolist(), 0]
            ids += [number] * len(tokens_T)
        fill = seq_len - len(labels)
        assert batch.labels_BT[b].tolist() == labels + [PAD] * fill
        assert batch.label_spans_BT[b].tolist() == spans + [0] * fill
        assert batch.doc_ids_BT[b].tolist() == ids + [-1] * fill
    assert batch.doc_ids_BT.dtype == torch.int32
    assert torch.equal(batch.target_index_N, batch.label_spans_BT.flatten().nonzero()[:, 0])


def test_targets_stand_at_their_positions(rng: np.random.Generator) -> None:
    scored, documents = random_row(rng, [(3, 4, 2), (2, 0, 6)], 24, VOCAB)
    vanilla, _ = random_row(rng, [(4, 5, 6)], 24, VOCAB)
    batch = make_batch([vanilla, scored], [None, documents])
    written = torch.zeros(24, VOCAB, dtype=torch.float64)
    logprob, top = torch.zeros(24), torch.full((24,), -1)
    for document, where in zip(documents, scored.documents(), strict=True):
        at = document.target.positions_P + where.start
        written[at] = torch.from_numpy(dense_weights(document.target, VOCAB))
        logprob[at] = torch.from_numpy(document.target.realised_logprob_P)
    has_head = written.max(dim=1).values > documents[0].target.threshold
    top[has_head] = written.argmax(dim=1)[has_head]
    dense = torch.zeros(24, VOCAB, dtype=torch.float64).scatter_add_(
        1, batch.target_ids_BTK[1].long(), batch.target_weights_BTK[1].double()
    )
    assert torch.equal(dense, written)
    assert torch.equal(batch.teacher_logprob_BT[1], logprob)
    assert torch.equal(batch.teacher_top_BT[1], top)
    assert torch.equal(batch.has_target_BT[1], batch.label_spans_BT[1] != 0)
    assert not batch.has_target_BT[0].any() and not batch.target_weights_BTK[0].any()
    sums = [d.entropy_sums for d in documents]
    totals = [sum(getattr(s, name) for s in sums) for name in ("reasoning", "final", "control")]
    assert batch.entropy_sums_C.tolist() == pytest.approx(totals)


@pytest.mark.parametrize("scored", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_a_row_scored_in_part_has_targets_at_those_documents_alone(
    scored: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Beside the batch of the whole row: equal at the scored documents, nothing at the others."""
    row, documents = random_row(rng, [(3, 4, 2), (2, 0, 6), (1, 5, 0)], 27, VOCAB)
    part = make_batch([row], [[d if n in scored else None for n, d in enumerate(documents)]])
    whole = make_batch([row], [documents])
    at_BT = torch.isin(part.doc_ids_BT, torch.tensor(scored))
    assert torch.equal(part.has_target_BT, whole.has_target_BT & at_BT)
    width = part.target_ids_BTK.shape[2]
    for name in ("target_ids_BTK", "target_weights_BTK"):
        expected = getattr(whole, name) * at_BT[..., None]
        assert torch.equal(getattr(part, name), expected[..., :width])
        assert not expected[..., width:].any()
    assert torch.equal(part.teacher_logprob_BT, whole.teacher_logprob_BT * at_BT)
    assert torch.equal(part.teacher_top_BT, torch.where(at_BT, whole.teacher_top_BT, -1))
    for name in ("labels_BT", "label_spans_BT", "target_index_N", "is_control_BT"):
        assert torch.equal(getattr(part, name), getattr(whole, name))
    sums = [documents[n].entropy_sums for n in scored]
    totals = [sum(getattr(s, name) for s in sums) for name in ("reasoning", "final", "control")]
    assert part.entropy_sums_C.tolist() == pytest.approx(totals)


def test_targets_of_which_none_is_there_are_refused(rng: np.random.Generator) -> None:
    """A row without any target is None; a list of nothing is a mistake of the caller."""
    row, _ = random_row(rng, [(3, 4, 2), (2, 1, 1)], 24, VOCAB)
    with pytest.raises(AlignmentError, match="no document was scored"):
        make_batch([row], [[None, None]])
    with pytest.raises(AlignmentError, match="1 documents"):
        make_batch([row], [[None]])


def test_without_scored_rows_there_are_no_entries(rng: np.random.Generator) -> None:
    row, _ = random_row(rng, [(3, 4, 2)], 12, VOCAB)
    batch = make_batch([row])
    assert batch.target_ids_BTK.shape == batch.target_weights_BTK.shape == (1, 12, 0)
    assert batch.entropy_sums_C.tolist() == [0, 0, 0]


def _drop_last_position(document: DocTarget) -> DocTarget:
    target, last = document.target, int(document.target.offsets_P1[-2])
    shorter = dataclasses.replace(
        target,
        positions_P=target.positions_P[:-1],
        num_head_P=target.num_head_P[:-1],
        offsets_P1=target.offsets_P1[:-1],
        ids_E=target.ids_E[:last],
        weights_E=target.weights_E[:last],
        realised_logprob_P=target.realised_logprob_P[:-1],
        log_tail_mass_P=target.log_tail_mass_P[:-1],
    )
    return dataclasses.replace(document, target=shorter)


def _empty_first_position(document: DocTarget) -> DocTarget:
    target, first = document.target, int(document.target.offsets_P1[1])
    emptied = dataclasses.replace(
        target,
        offsets_P1=np.concatenate([[0], target.offsets_P1[1:] - first]),
        ids_E=target.ids_E[first:],
        weights_E=target.weights_E[first:],
    )
    return dataclasses.replace(document, target=emptied)


def _id_beyond_the_vocabulary(document: DocTarget) -> DocTarget:
    ids_E = document.target.ids_E.copy()
    ids_E[0] = 201_088
    return dataclasses.replace(document, target=dataclasses.replace(document.target, ids_E=ids_E))


def _weight_that_is_no_number(document: DocTarget) -> DocTarget:
    weights_E = document.target.weights_E.copy()
    weights_E[-1] = np.nan
    target = dataclasses.replace(document.target, weights_E=weights_E)
    return dataclasses.replace(document, target=target)


@pytest.mark.parametrize(
    "damage",
    [
        _drop_last_position,
        _empty_first_position,
        _id_beyond_the_vocabulary,
        _weight_that_is_no_number,
    ],
)
def test_damaged_targets_are_refused(damage, rng: np.random.Generator) -> None:
    row, documents = random_row(rng, [(3, 4, 2)], 12, VOCAB)
    make_batch([row], [documents])
    with pytest.raises(AlignmentError):
        make_batch([row], [[damage(documents[0])]])
    pair, both = random_row(rng, [(3, 4, 2), (2, 3, 3)], 24, VOCAB)
    make_batch([pair], [[None, both[1]]])
    with pytest.raises(AlignmentError):
        make_batch([pair], [[None, damage(both[1])]])


def test_targets_of_another_document_are_refused(rng: np.random.Generator) -> None:
    document = random_document(rng, 3, 4, 2, VOCAB)
    other = (document[0].copy(), document[1])
    other[0][1] += 1
    target = score(other, random_logprobs(rng, 6, VOCAB))
    with pytest.raises(AlignmentError):
        make_batch([pack([document], 12)], [[target]])


def _samples(logprobs: list[float], teacher: list[float] | None = None) -> ScoredTokens:
    return ScoredTokens(
        sampling_logprob_S=np.array(logprobs, dtype=np.float32),
        teacher_logprob_S=np.array(logprobs if teacher is None else teacher, dtype=np.float32),
    )


def test_sampled_tokens_stand_where_their_tokens_are_predicted(rng: np.random.Generator) -> None:
    """Two documents of a row sampled, one with targets, the one between them not; the next row is the anchor's."""
    row, documents = random_row(rng, [(3, 2, 1), (1, 2, 2), (2, 0, 2)], 20, VOCAB)
    first, last = _samples([-1, -2, -3], [-4, -5, -6]), _samples([-7, 0], [0, -8])
    batch = make_batch([row, row], [[documents[0], None, None], None], [[first, None, last], None])
    at = torch.tensor([2, 3, 4, 14, 15])
    assert batch.sampled_BT.nonzero().tolist() == [[0, t] for t in at.tolist()]
    assert batch.sampling_logprob_BT[0, at].tolist() == [-1, -2, -3, -7, 0]
    assert batch.teacher_logprob_BT[0, at].tolist() == [-4, -5, -6, 0, -8]
    off = ~batch.sampled_BT
    assert not batch.sampling_logprob_BT[off].any() and not batch.teacher_logprob_BT[off].any()
    assert batch.has_target_BT.nonzero().tolist() == [[0, 2], [0, 3], [0, 4]]
    assert batch.label_spans_BT[0, at].tolist() == [1, 1, 2, 2, 2]
    plain = make_batch([row, row])
    assert not plain.sampled_BT.any() and not plain.sampling_logprob_BT.any()


def test_heads_and_tails_stand_at_their_positions(rng: np.random.Generator) -> None:
    row, documents = random_row(rng, [(3, 4, 2), (2, 1, 6)], 24, VOCAB)
    batch = make_batch([row], [[documents[0], None]])
    target, at = documents[0].target, documents[0].target.positions_P
    assert batch.target_num_head_BT[0, at].tolist() == target.num_head_P.tolist()
    assert batch.target_log_tail_BT[0, at].tolist() == target.log_tail_mass_P.tolist()
    assert target.num_head_P.any()
    off = ~batch.has_target_BT
    assert not batch.target_num_head_BT[off].any() and not batch.target_log_tail_BT[off].any()


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (_samples([-1, -2]), "2"),
        (_samples([-1, -2, -3, -4]), "4"),
        (_samples([-1, -2, -3], [-1, -2]), "the teacher"),
        (_samples([-1, np.nan, -3]), "sampled token 1"),
        (_samples([-1, -2, -np.inf]), "sampled token 2"),
        (_samples([0.5, -2, -1]), "the student"),
        (_samples([-1, -2, -1], [-1, -1, 0.25]), "the teacher"),
        (_samples([-1, -2, -1], [-np.inf, -1, 0]), "the teacher"),
    ],
)
def test_impossible_samples_are_refused(
    wrong: ScoredTokens, what: str, rng: np.random.Generator
) -> None:
    row, documents = random_row(rng, [(3, 2, 1), (2, 0, 6)], 24, VOCAB)
    make_batch([row], [documents], [[_samples([-1, -2, -3]), None]])
    with pytest.raises(AlignmentError, match=what):
        make_batch([row], [documents], [[wrong, None]])


def test_samples_are_given_for_every_document(rng: np.random.Generator) -> None:
    row, _ = random_row(rng, [(3, 2, 1), (2, 0, 6)], 24, VOCAB)
    with pytest.raises(AlignmentError, match="1 documents"):
        make_batch([row], None, [[_samples([-1, -2, -3])]])
