"""The alignment gate: passes every teacher that reads the text, refuses targets of any other place."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from common.errors import AlignmentError
from datastore.alignment import (
    MIN_MARGIN,
    AlignmentReport,
    alignment_report,
    require_aligned,
    require_same_source,
)
from datastore.codec import CODEC_VERSION, decode_blob, encode_blob
from datastore.id_order import IdOrder
from datastore.manifest import DatasetManifest, TargetManifest, TokenizerInfo
from datastore.target import content_key, position_uniforms, reduce_logprobs, target_positions
from datastore.types import DocTarget, PackedRow, SparseTarget, TargetSums

VOCAB, LENGTH, DOCUMENTS = 200, 120, 12
Pairs = list[tuple[np.ndarray, SparseTarget]]


def language(rng: np.random.Generator) -> np.ndarray:
    """Bigram probabilities [V, V]: each token has a few likely successors; common tokens are common."""
    common_V = 1 / np.arange(1, VOCAB + 1)
    bigram_VV = rng.dirichlet(np.full(6, 0.7), size=VOCAB)
    chances_VV = np.tile(0.1 * common_V / common_V.sum(), (VOCAB, 1))
    for token in range(VOCAB):
        chances_VV[token, rng.choice(VOCAB, 6, replace=False, p=common_V / common_V.sum())] += (
            0.9 * bigram_VV[token]
        )
    return chances_VV


def texts(chances_VV: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    documents = []
    for _ in range(DOCUMENTS):
        tokens = [int(rng.integers(VOCAB))]
        while len(tokens) < LENGTH:
            tokens.append(int(rng.choice(VOCAB, p=chances_VV[tokens[-1]])))
        documents.append(np.array(tokens, dtype=np.int32))
    return documents


def spans_of(tokens_T: np.ndarray) -> np.ndarray:
    """A prompt of five tokens, then reasoning, then a document end that is no target."""
    spans_T = np.ones(len(tokens_T), dtype=np.uint8)
    spans_T[:5] = spans_T[-1] = 0
    return spans_T


def score(tokens_T: np.ndarray, chances_VV: np.ndarray, *, late: int = 0) -> SparseTarget:
    """Targets of a bigram teacher; `late` shifts its logits against the text, realised ids kept."""
    positions_P = target_positions(tokens_T, spans_of(tokens_T))
    context_P = tokens_T[np.clip(positions_P - late, 0, len(tokens_T) - 1)]
    return reduce_logprobs(
        np.log(chances_VV[context_P]),
        tokens_T[positions_P + 1],
        positions_P,
        position_uniforms(content_key(tokens_T), positions_P),
        1 / 50,
    )


@pytest.fixture(scope="module")
def world() -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(11)
    chances_VV = language(rng)
    return chances_VV, texts(chances_VV, rng)


def learned(documents: list[np.ndarray], bigram_share: float) -> np.ndarray:
    """What a counting teacher makes of the texts: smoothed bigrams mixed with unigrams."""
    pairs_VV = np.full((VOCAB, VOCAB), 1e-3)
    for tokens_T in documents:
        np.add.at(pairs_VV, (tokens_T[:-1], tokens_T[1:]), 1)
    unigram_V = pairs_VV.sum(axis=0) / pairs_VV.sum()
    return (
        bigram_share * pairs_VV / pairs_VV.sum(axis=1, keepdims=True)
        + (1 - bigram_share) * unigram_V
    )


def judge(pairs: Pairs) -> AlignmentReport:
    report = alignment_report(pairs)
    require_aligned(report)
    return report


def test_the_true_teacher_passes(world):
    chances_VV, documents = world
    report = judge([(tokens_T, score(tokens_T, chances_VV)) for tokens_T in documents])
    assert report.documents == DOCUMENTS
    assert report.positions == DOCUMENTS * (LENGTH - 6)
    assert report.disagreements == report.foreign_entries == 0
    assert min(report.margin_back, report.margin_ahead) > 1.0
    assert json.loads(report.model_dump_json()) == report.resolved()


def test_stored_targets_pass_as_well(world):
    """Through the codec: rounding moves head and realised logprob apart, within the gate's tolerance."""
    chances_VV, documents = world
    sums, order = TargetSums(reasoning=0.0, final=0.0, control=0.0), IdOrder.identity()
    pairs = []
    for tokens_T in documents:
        target = score(tokens_T, chances_VV)
        document = DocTarget(content_key=content_key(tokens_T), target=target, entropy_sums=sums)
        row = PackedRow(
            tokens_T=tokens_T,
            spans_T=spans_of(tokens_T),
            doc_ends_D=np.array([len(tokens_T)], dtype=np.int32),
            doc_ids=(bytes(16),),
            languages=("",),
            exercises=("",),
            row_hash=0,
        )
        stored = decode_blob(encode_blob([document], row, order), row, order)[0].target
        pairs.append((tokens_T, stored))
    assert judge(pairs).disagreements == 0


def test_a_weak_ngram_teacher_passes(world):
    """Learned from other text of the language and diluted with 19 parts of unigram: wins by about 0.6 nat."""
    chances_VV, documents = world
    other = texts(chances_VV, np.random.default_rng(12))
    report = judge([(t, score(t, learned(other, 0.05))) for t in documents])
    assert 4 * MIN_MARGIN < min(report.margin_back, report.margin_ahead) < 1.0


def test_a_teacher_that_knows_no_position_is_refused(world):
    """Unigrams fit every shift alike: nothing shows that they stand right."""
    _, documents = world
    unigram = learned(documents, 0.0)
    with pytest.raises(AlignmentError, match=r"fits token t\+1 better"):
        judge([(t, score(t, unigram)) for t in documents])


@pytest.mark.parametrize("late", [-1, 1])
@pytest.mark.parametrize("share", [1.0, 0.05])
def test_logits_shifted_by_one_are_refused(world, late, share):
    """The realised logprobs agree (they come from the same wrong logits): the shift alone tells."""
    _, documents = world
    teacher = learned(documents, share)
    report = alignment_report([(t, score(t, teacher, late=late)) for t in documents])
    assert report.disagreements == 0
    with pytest.raises(AlignmentError, match="needed"):
        require_aligned(report)


@pytest.mark.parametrize("share", [1.0, 0.05])
@pytest.mark.parametrize("shift", [-1, 1])
def test_entries_moved_by_one_position_are_refused(world, shift, share):
    _, documents = world
    teacher = learned(documents, share)
    pairs = []
    for tokens_T in documents:
        target = score(tokens_T, teacher)
        moved_P = np.clip(target.positions_P + shift, 0, LENGTH - 3).astype(np.int32)
        pairs.append((tokens_T, replace(target, positions_P=moved_P)))
    report = alignment_report(pairs)
    assert report.disagreements > 0.3 * report.positions
    with pytest.raises(AlignmentError, match="realised logprobs are not"):
        require_aligned(report)


def test_targets_of_other_documents_are_refused(world):
    chances_VV, documents = world
    others = [*documents[1:], documents[0]]
    pairs = [(t, score(other, chances_VV)) for t, other in zip(documents, others, strict=True)]
    report = alignment_report(pairs)
    assert report.disagreements > 0.3 * report.positions
    assert max(report.margin_back, report.margin_ahead) < MIN_MARGIN
    with pytest.raises(AlignmentError, match="fits token"):
        require_aligned(report)


def test_one_foreign_document_among_many_is_refused(world):
    """The mean barely moves; the realised logprobs betray it."""
    chances_VV, documents = world
    pairs = [(t, score(t, chances_VV)) for t in documents]
    pairs[3] = (documents[3], pairs[4][1])
    report = alignment_report(pairs)
    assert min(report.margin_back, report.margin_ahead) > MIN_MARGIN
    with pytest.raises(AlignmentError, match="realised logprobs are not"):
        require_aligned(report)


def test_another_temperature_of_the_head_is_refused(world):
    """Head weights at temperature 2 beside realised logprobs at 1."""
    chances_VV, documents = world
    pairs = []
    for tokens_T in documents:
        cool, warm_VV = score(tokens_T, chances_VV), chances_VV**0.5
        warm = score(tokens_T, warm_VV / warm_VV.sum(axis=1, keepdims=True))
        pairs.append((tokens_T, replace(warm, realised_logprob_P=cool.realised_logprob_P)))
    with pytest.raises(AlignmentError, match="realised logprobs are not"):
        judge(pairs)


@pytest.mark.parametrize(
    ("token", "message"), [(201088, "outside 0"), (-1, "outside 0"), (199999, "padding")]
)
def test_mass_where_no_text_is_is_refused(world, token, message):
    chances_VV, documents = world
    pairs = []
    for tokens_T in documents:
        target = score(tokens_T, chances_VV)
        ids_E = target.ids_E.copy()
        last = target.offsets_P1[1:] - 1
        unread = ids_E[last] != tokens_T[target.positions_P + 1]
        ids_E[last[unread]] = token
        pairs.append((tokens_T, replace(target, ids_E=ids_E)))
    with pytest.raises(AlignmentError, match=message):
        judge(pairs)


def test_lost_realised_logprobs_are_refused(world):
    chances_VV, documents = world
    pairs = [(t, score(t, chances_VV)) for t in documents]
    pairs[0][1].realised_logprob_P[0] = np.nan
    with pytest.raises(AlignmentError, match="1 realised logprobs"):
        judge(pairs)


def test_too_little_evidence_is_refused(world):
    chances_VV, documents = world
    short_T = documents[0][:50]
    for pairs in ([], [(short_T, score(short_T, chances_VV))]):
        with pytest.raises(AlignmentError, match="too few"):
            alignment_report(pairs)


def test_targets_outside_their_tokens_are_refused(world):
    chances_VV, documents = world
    with pytest.raises(AlignmentError, match="outside its tokens"):
        alignment_report([(documents[0][:60], score(documents[0], chances_VV))])


def manifests() -> tuple[TargetManifest, DatasetManifest]:
    dataset = DatasetManifest(
        format_version=1,
        files={},
        dataset_id="a",
        fingerprint="f" * 64,
        seq_len=64,
        git_sha=None,
        config={},
        config_hash="c",
        tokenizer=TokenizerInfo(),
        renderer_version="1",
        sources=(),
        split_rule={},
        counts={},
        rejects={},
        truncated={},
    )
    targets = TargetManifest(
        format_version=1,
        files={},
        codec_version=CODEC_VERSION,
        target_id="t",
        dataset_fingerprint=dataset.fingerprint,
        teacher={},
        slug="tiny",
        engine={},
        mode={},
        temperature=1.0,
        threshold=1 / 50,
        tokenizer=TokenizerInfo(),
        budget={},
        alignment={},
        counts={},
        id_order_sha256="o",
        selection={},
        shard_budgets={},
        quarantine=(),
        canary={},
        self_noise={},
    )
    return targets, dataset


def test_the_same_source_passes():
    require_same_source(*manifests())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_fingerprint": "0" * 64}, "dataset fingerprint 000"),
        ({"temperature": 0.7}, r"temperature 0\.7; expected temperature 1\.0"),
        ({"codec_version": CODEC_VERSION + 1}, "codec version"),
        ({"tokenizer": TokenizerInfo(ranks_sha256="0")}, "tokenizer"),
        ({"tokenizer": TokenizerInfo(vocab_size=201000)}, "201000"),
    ],
)
def test_another_source_is_refused(changes, message):
    targets, dataset = manifests()
    with pytest.raises(AlignmentError, match=message):
        require_same_source(targets.model_copy(update=changes), dataset)


def test_two_wrong_tokenizers_are_no_match():
    targets, dataset = manifests()
    other = {"tokenizer": TokenizerInfo(name="o200k_base")}
    with pytest.raises(AlignmentError, match="locked tokenizer"):
        require_same_source(targets.model_copy(update=other), dataset.model_copy(update=other))
