"""The alignment gate: do these teacher targets belong to these tokens? Pure; it refuses, it never warns.

Two independent signs, both needed:
- agreement: the stored logprob of the realised token must be that of the head entry with its id, or lie below the
  threshold when the head lacks it. No teacher is too weak for it, and no position may break it.
- shift: over all positions the target of entry t must fit token t+1 better than tokens t and t+2. It sees the errors
  that are consistent in themselves, such as logits one position late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from common.config import Config
from common.errors import AlignmentError
from common.tokenizer import PAD, VOCAB_SIZE
from datastore.codec import CODEC_VERSION
from datastore.manifest import DatasetManifest, TargetManifest, TokenizerInfo
from datastore.types import SparseTarget

MIN_POSITIONS = 100
# Nats by which shift 0 must win. On synthetic text a counted bigram teacher wins by 3.6, one diluted with 19 parts of
# unigram by 0.6, with 99 parts by 0.15, and unigrams, which know no position, by 0.0; the 19-part teacher one position
# late loses by 0.6 (tests/datastore/test_alignment.py).
MIN_MARGIN = 0.1
# The margin must also stand this many standard errors above 0: few or noisy positions prove nothing.
MIN_SIGMAS = 4.0
# Probability that a teacher may put on <|endoftext|>, which no scored text holds. A draw of weight 1/50 in 100
# positions is 2e-4; padding scored as text gives close to 1.
MAX_PADDING_MASS = 0.01
# The score of a token that is not stored is ln(threshold / 20): bounded, and below any stored weight.
FLOOR_SHARE = 1 / 20
# A stored realised logprob stands at most 3/64 nat from its stored head entry (docs/format.md).
AGREEMENT_TOLERANCE = 1 / 16


class AlignmentReport(Config):
    """Figures of the gate over `positions` scored tokens of `documents` documents or rows; scores in nats.

    score_*: mean of ln max(T_t(y_{t+1+shift}), floor) at shift -1, 0, +1. margin_*: mean of (score at 0 - score at
    the shift), and sigma_*: its standard error. disagreements: positions whose realised logprob is not that of the
    realised token. foreign_entries: entries with an id outside the vocabulary. padding_mass: mean weight on PAD.
    """

    documents: int
    positions: int
    score_back: float
    score_zero: float
    score_ahead: float
    margin_back: float
    margin_ahead: float
    sigma_back: float
    sigma_ahead: float
    disagreements: int
    foreign_entries: int
    padding_mass: float


def alignment_report(
    pairs: Iterable[tuple[np.ndarray, SparseTarget]],
    *,
    too_few: str = "give the gate more documents",
) -> AlignmentReport:
    """Measure documents (or packed rows) against their targets, given in the same coordinates.

    pairs: (tokens_T int32, target). too_few: what to do about too few positions. Raises AlignmentError when there are
    too few to judge, or a target stands outside its tokens.
    """
    scores, disagreements, foreign, padding, documents = [], 0, 0, 0.0, 0
    for tokens_T, target in pairs:
        scores.append(_shift_scores(tokens_T, target))
        disagreements += _disagreements(tokens_T, target)
        foreign += int(((target.ids_E < 0) | (target.ids_E >= VOCAB_SIZE)).sum())
        padding += float(target.weights_E[target.ids_E == PAD].sum())
        documents += 1
    scores_P3 = np.concatenate(scores) if scores else np.empty((0, 3))
    num_positions = len(scores_P3)
    if num_positions < MIN_POSITIONS:
        raise AlignmentError(
            "too few scored tokens to judge their alignment",
            got=f"{num_positions} in {documents} documents",
            expected=f"at least {MIN_POSITIONS}",
            remedy=too_few,
        )
    means = scores_P3.mean(axis=0).tolist()
    margins_P2 = scores_P3[:, [1]] - scores_P3[:, [0, 2]]
    sigmas = (margins_P2.std(axis=0, ddof=1) / math.sqrt(num_positions)).tolist()
    return AlignmentReport(
        documents=documents,
        positions=num_positions,
        score_back=means[0],
        score_zero=means[1],
        score_ahead=means[2],
        margin_back=means[1] - means[0],
        margin_ahead=means[1] - means[2],
        sigma_back=sigmas[0],
        sigma_ahead=sigmas[1],
        disagreements=disagreements,
        foreign_entries=foreign,
        padding_mass=padding / num_positions,
    )


def require_aligned(report: AlignmentReport) -> None:
    """AlignmentError with every figure that fails."""
    faults = []
    for name, margin, sigma in (
        ("t", report.margin_back, report.sigma_back),
        ("t+2", report.margin_ahead, report.sigma_ahead),
    ):
        needed = max(MIN_MARGIN, MIN_SIGMAS * sigma)
        if not margin >= needed:
            faults.append(
                f"the target at t fits token t+1 better than token {name} by {margin:.3f} nats, "
                f"needed {needed:.3f}"
            )
    if report.disagreements:
        faults.append(f"{report.disagreements} realised logprobs are not of the realised token")
    if report.foreign_entries:
        faults.append(f"{report.foreign_entries} entries have an id outside 0..{VOCAB_SIZE - 1}")
    if not report.padding_mass <= MAX_PADDING_MASS:
        faults.append(f"mean mass {report.padding_mass:.3g} on padding, at most {MAX_PADDING_MASS}")
    if faults:
        raise AlignmentError(
            f"teacher targets do not fit their tokens ({report.positions} positions)",
            got="; ".join(faults),
            expected="the target at t to predict token t+1",
            remedy="check the teacher's template and weights, then score again",
        )


def require_same_source(targets: TargetManifest, dataset: DatasetManifest) -> None:
    """AlignmentError with every identity of the targets that is not the dataset's or not what the loss takes.

    The dataset's fingerprint holds its renderer version, template, source files and order, so they need no check of
    their own.
    """
    checks = [
        ("dataset fingerprint", targets.dataset_fingerprint, dataset.fingerprint),
        ("tokenizer", targets.tokenizer, dataset.tokenizer),
        ("locked tokenizer", dataset.tokenizer, TokenizerInfo()),
        ("temperature", targets.temperature, 1.0),
        ("codec version", targets.codec_version, CODEC_VERSION),
    ]
    wrong = [(name, found, needed) for name, found, needed in checks if found != needed]
    if wrong:
        raise AlignmentError(
            f"targets of {targets.slug} cannot be used with this dataset",
            got=", ".join(f"{name} {found}" for name, found, _ in wrong),
            expected=", ".join(f"{name} {needed}" for name, _, needed in wrong),
            remedy="score this dataset again",
        )


def _shift_scores(tokens_T: np.ndarray, target: SparseTarget) -> np.ndarray:
    """Scores at shift -1, 0, +1 of the positions that have a token at all three: float64 [P', 3]."""
    positions_P = target.positions_P.astype(np.int64)
    if len(positions_P) and not 0 <= positions_P.min() <= positions_P.max() < len(tokens_T) - 1:
        raise AlignmentError(
            "a target stands outside its tokens",
            got=f"positions {positions_P.min()} to {positions_P.max()}",
            expected=f"0 to {len(tokens_T) - 2}",
            remedy="score this dataset again",
        )
    judged_P = positions_P + 2 < len(tokens_T)
    labels = [tokens_T[np.minimum(positions_P + ahead, len(tokens_T) - 1)] for ahead in (0, 1, 2)]
    weights_3P = np.stack([_weight_of(target, labels_P) for labels_P in labels])
    return np.log(np.maximum(weights_3P, target.threshold * FLOOR_SHARE)).T[judged_P]


def _weight_of(target: SparseTarget, ids_P: np.ndarray) -> np.ndarray:
    """The stored weight of one id a position, 0 where it is not stored: float64 [P]."""
    rows_E = np.repeat(np.arange(len(ids_P)), np.diff(target.offsets_P1))
    hit_E = target.ids_E == ids_P[rows_E]
    return np.bincount(rows_E[hit_E], target.weights_E[hit_E], minlength=len(ids_P))


def _disagreements(tokens_T: np.ndarray, target: SparseTarget) -> int:
    """Positions whose realised logprob contradicts their head."""
    labels_P = tokens_T[target.positions_P + 1]
    rows_E = np.repeat(np.arange(len(labels_P)), np.diff(target.offsets_P1))
    rank_E = np.arange(len(rows_E)) - target.offsets_P1[rows_E]
    hit_E = (target.ids_E == labels_P[rows_E]) & (rank_E < target.num_head_P[rows_E])
    gap_P = target.realised_logprob_P - math.log(target.threshold)  # unstored: at most 0
    gap_P[rows_E[hit_E]] = np.abs(
        target.realised_logprob_P[rows_E[hit_E]] - np.log(target.weights_E[hit_E])
    )
    return int((~(gap_P <= AGREEMENT_TOLERANCE)).sum())
