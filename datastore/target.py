"""Sparse teacher targets: which entries of a distribution are kept, and where they belong. Pure numpy.

At threshold t every id with p >= t is kept exactly (the head); the other ids, in id order, are sampled
systematically with spacing t, each draw carrying weight t. An id is kept with probability min(1, p/t) and weight
p / min(1, p/t): sampling with probability proportional to size, unbiased, at most 1/t + 1 entries
(Horvitz & Thompson 1952; Madow 1949). docs/format.md, "Sparse target and codec", has the same in full.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from common.errors import AlignmentError, FormatError
from common.tokenizer import FIRST_CONTROL_ID, VOCAB_SIZE
from datastore.types import (
    SPAN_FINAL,
    SPAN_IGNORED,
    SPAN_REASONING,
    DocTarget,
    PackedRow,
    SparseTarget,
    TargetSums,
)

# Below 1/254 a flat distribution could take 256 draws, which a byte cannot count.
MIN_THRESHOLD, MAX_THRESHOLD = 1 / 254, 1 / 2
NORMALISATION_TOLERANCE = 1e-3
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def content_key(tokens_T: np.ndarray) -> int:
    """xxh3_64 of the tokens as little-endian int32: what a document says."""
    return xxhash.xxh3_64_intdigest(np.asarray(tokens_T, dtype="<i4").tobytes())


def position_uniforms(content_key: int | np.ndarray, positions_P: np.ndarray) -> np.ndarray:
    """The uniform number u of each position, float64 [P] in [0, 1), multiples of 2^-24 (exact in float32).

    content_key: of one document, or uint64 [P] for positions of several.

    Position p takes output number p of the SplitMix64 stream seeded with `content_key` (Steele, Lea & Flood
    2014), its top 24 bits: the same document repeats its draws on any machine.
    """
    steps_P = np.asarray(positions_P).astype(np.uint64) + np.uint64(1)
    x_P = np.asarray(content_key, dtype=np.uint64) + _GAMMA * steps_P
    x_P = (x_P ^ (x_P >> np.uint64(30))) * _MIX_1
    x_P = (x_P ^ (x_P >> np.uint64(27))) * _MIX_2
    x_P = x_P ^ (x_P >> np.uint64(31))
    return (x_P >> np.uint64(40)).astype(np.float64) / 2.0**24


def target_positions(tokens_T: np.ndarray, spans_T: np.ndarray) -> np.ndarray:
    """Positions t of one document whose token t+1 is a target: int32 [P], ascending.

    Raises FormatError when the two arrays differ in length or the first token is a target, which nothing predicts.
    """
    if len(tokens_T) != len(spans_T):
        raise FormatError(
            "a document's spans",
            got=f"{len(spans_T)} spans",
            expected=f"{len(tokens_T)} (one a token)",
        )
    if len(spans_T) and spans_T[0] != SPAN_IGNORED:
        raise FormatError(
            "a document's first token is a target", got=f"span {spans_T[0]}", expected="span 0"
        )
    return np.flatnonzero(spans_T[1:] != SPAN_IGNORED).astype(np.int32)


def class_masks(
    tokens_T: np.ndarray, spans_T: np.ndarray, positions_P: np.ndarray
) -> dict[str, np.ndarray]:
    """Which entries belong to each class: name -> bool [P].

    The class of entry t is the span of token t+1. `control` (id >= 199998) overlaps with the spans.
    """
    label_spans_P = spans_T[positions_P + 1]
    return {
        "reasoning": label_spans_P == SPAN_REASONING,
        "final": label_spans_P == SPAN_FINAL,
        "control": tokens_T[positions_P + 1] >= FIRST_CONTROL_ID,
    }


def entropy_sums(
    entropy_P: np.ndarray, tokens_T: np.ndarray, spans_T: np.ndarray, positions_P: np.ndarray
) -> TargetSums:
    """The teacher's entropy in nats summed over each class of a document's entries, in float64."""
    masks = class_masks(tokens_T, spans_T, positions_P)
    exact_P = entropy_P.astype(np.float64)
    return TargetSums(**{name: float(exact_P[mask_P].sum()) for name, mask_P in masks.items()})


def require_threshold(threshold: float) -> None:
    """FormatError unless `threshold` lies in [1/254, 1/2], the range that the codec holds."""
    if not MIN_THRESHOLD <= threshold <= MAX_THRESHOLD:
        raise FormatError("threshold of a target", got=threshold, expected="1/254 to 1/2")


def reduce_logprobs(
    logprobs_PV: np.ndarray,
    realised_ids_P: np.ndarray,
    positions_P: np.ndarray,
    uniforms_P: np.ndarray,
    threshold: float,
) -> SparseTarget:
    """The float64 reference of the reduction that the scorer runs on the device.

    logprobs_PV: normalised natural-log probabilities (-inf allowed) over V real ids, row p at position
    positions_P[p] scoring the token realised_ids_P[p]. uniforms_P: `position_uniforms`.
    Raises FormatError when a row is not normalised to 1e-3 or the threshold is out of range.
    """
    require_threshold(threshold)
    logprobs_PV = np.asarray(logprobs_PV, dtype=np.float64)
    mass_P = np.exp(logprobs_PV).sum(axis=1)
    if not np.all(np.abs(mass_P - 1) <= NORMALISATION_TOLERANCE):
        worst = int(np.argmax(np.abs(mass_P - 1)))
        raise FormatError(
            f"logprobs of position {positions_P[worst]} are not a distribution",
            got=f"total mass {mass_P[worst]:.6g}",
            expected="1",
        )
    kept = [
        _reduce_position(row_V, u, threshold)
        for row_V, u in zip(logprobs_PV, uniforms_P, strict=True)
    ]
    rows = np.arange(len(kept))
    counts_P = np.array([len(ids) for ids, _, _, _ in kept], dtype=np.int64)
    realised_P = logprobs_PV[rows, realised_ids_P]
    return SparseTarget(
        threshold=threshold,
        positions_P=np.asarray(positions_P, dtype=np.int32),
        num_head_P=np.array([num_head for _, _, num_head, _ in kept], dtype=np.int32),
        offsets_P1=np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64),
        ids_E=_concatenate([ids for ids, _, _, _ in kept], np.int32),
        weights_E=_concatenate([weights for _, weights, _, _ in kept], np.float32),
        realised_logprob_P=np.minimum(realised_P, 0.0).astype(np.float32),
        log_tail_mass_P=np.array([tail for _, _, _, tail in kept], dtype=np.float32),
        entropy_P=_entropy(logprobs_PV).astype(np.float32),
    )


def _reduce_position(
    logprobs_V: np.ndarray, uniform: float, threshold: float
) -> tuple[np.ndarray, np.ndarray, int, float]:
    """ids, weights, number of head entries and log tail mass of one position."""
    probs_V = np.exp(logprobs_V)
    in_head_V = probs_V >= threshold
    head_ids = np.flatnonzero(in_head_V)
    head_ids = head_ids[np.argsort(-probs_V[head_ids], kind="stable")]
    # ceil(c/t - u) points (j+u)t lie below c. Taking differences of that count hits an id at most once by
    # construction, also where rounding makes an id as wide as t; a search per point would not.
    tail_cumulative_V = np.cumsum(np.where(in_head_V, 0.0, probs_V))
    points_below_V = np.maximum(np.ceil(tail_cumulative_V / threshold - uniform), 0.0)
    draw_ids = np.flatnonzero(np.diff(points_below_V, prepend=0.0) > 0)
    ids = np.concatenate([head_ids, draw_ids])
    draw_weights = np.full(len(draw_ids), threshold)
    weights = np.concatenate([np.minimum(probs_V[head_ids], 1.0), draw_weights])
    return ids, weights, len(head_ids), min(_logsumexp(logprobs_V[~in_head_V]), 0.0)


def _logsumexp(values: np.ndarray) -> float:
    if not len(values) or (top := values.max()) == -np.inf:
        return -np.inf
    return float(top + np.log(np.exp(values - top).sum()))


def _entropy(logprobs_PV: np.ndarray) -> np.ndarray:
    finite_PV = np.where(np.isneginf(logprobs_PV), 0.0, logprobs_PV)
    return np.maximum(-(np.exp(logprobs_PV) * finite_PV).sum(axis=1), 0.0)


def _concatenate(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)


def dense_weights(target: SparseTarget, vocab_size: int) -> np.ndarray:
    """The weights of a sparse target written out: float64 [P, V]. For tests and displays of few positions."""
    num_positions = len(target.positions_P)
    rows_E = np.repeat(np.arange(num_positions), np.diff(target.offsets_P1))
    weights_PV = np.zeros((num_positions, vocab_size))
    np.add.at(weights_PV, (rows_E, target.ids_E), target.weights_E.astype(np.float64))
    return weights_PV


def row_target(documents: Sequence[DocTarget | None], row: PackedRow) -> SparseTarget:
    """The targets of a packed row in row coordinates, joined by content: those of its scored documents.

    documents: one a document of the row, None where it was not scored; at least one was. Each covers exactly the
    target positions of its document. Raises AlignmentError when one does not, when its content key is not that of
    the row's tokens, or when no document was scored.
    """
    slices = row.documents()
    if len(documents) != len(slices):
        raise AlignmentError(
            "targets of a row", got=f"{len(documents)} documents", expected=f"{len(slices)}"
        )
    targets, shifted = [], []
    for number, (document, where) in enumerate(zip(documents, slices, strict=True)):
        if document is None:
            continue
        _require_same_document(document, row.tokens_T[where], row.spans_T[where], number)
        targets.append(document.target)
        shifted.append(document.target.positions_P + where.start)
    if not targets:
        raise AlignmentError(
            "targets of a row of which no document was scored", expected="no targets at all (null)"
        )
    return concatenate_targets(targets, shifted)


def concatenate_targets(targets: list[SparseTarget], positions: list[np.ndarray]) -> SparseTarget:
    """Targets end to end, at the given positions (int32 each). At least one; all of one threshold.

    Entropies stay only where every part has them. Raises AlignmentError when thresholds differ.
    """
    thresholds = {target.threshold for target in targets}
    if len(thresholds) != 1:
        raise AlignmentError(
            "targets to join", got=f"thresholds {sorted(thresholds)}", expected="one threshold"
        )
    counts_P = np.concatenate([np.diff(t.offsets_P1) for t in targets])
    entropies = [t.entropy_P for t in targets if t.entropy_P is not None]
    return SparseTarget(
        threshold=thresholds.pop(),
        positions_P=np.concatenate(positions).astype(np.int32),
        num_head_P=np.concatenate([t.num_head_P for t in targets]),
        offsets_P1=np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64),
        ids_E=np.concatenate([t.ids_E for t in targets]),
        weights_E=np.concatenate([t.weights_E for t in targets]),
        realised_logprob_P=np.concatenate([t.realised_logprob_P for t in targets]),
        log_tail_mass_P=np.concatenate([t.log_tail_mass_P for t in targets]),
        entropy_P=np.concatenate(entropies) if len(entropies) == len(targets) else None,
    )


def _require_same_document(
    document: DocTarget, tokens_T: np.ndarray, spans_T: np.ndarray, number: int
) -> None:
    found = content_key(tokens_T)
    if document.content_key != found:
        raise AlignmentError(
            f"targets of document {number} of the row were made for other tokens",
            got=f"content key {document.content_key:016x}",
            expected=f"{found:016x}",
            remedy="score this dataset again",
        )
    expected_P = target_positions(tokens_T, spans_T)
    if not np.array_equal(document.target.positions_P, expected_P):
        raise AlignmentError(
            f"targets of document {number} of the row stand at other positions",
            got=f"{len(document.target.positions_P)} positions",
            expected=f"{len(expected_P)}, those whose next token is a target",
            remedy="score this dataset again",
        )


def _require(condition: bool | np.bool_, what: str, expected: str) -> None:
    if not condition:
        raise FormatError(f"sparse target: {what}", expected=expected)


def require_valid(
    target: SparseTarget, head_tolerance: float = NORMALISATION_TOLERANCE
) -> np.ndarray:
    """Check that a target is a reduction of a distribution; returns which entries are heads (bool [E]).

    head_tolerance: how far below the threshold a head entry may lie, relative; the default is that of a fresh
    reduction. Raises FormatError naming the first rule that it breaks (`encode_blob` lists them).
    """
    require_threshold(target.threshold)
    counts_P = np.diff(target.offsets_P1)
    num_entries, num_positions = len(target.ids_E), len(target.positions_P)
    per_position = (target.num_head_P, target.realised_logprob_P, target.log_tail_mass_P, counts_P)
    _require(
        all(len(values) == num_positions for values in per_position),
        "its arrays differ in length",
        f"{num_positions} positions in each",
    )
    _require(
        len(target.weights_E) == num_entries == target.offsets_P1[-1]
        and target.offsets_P1[0] == 0
        and np.all(counts_P >= 0),
        "entries and offsets disagree",
        "offsets from 0 to the number of entries",
    )
    _require(
        np.all((target.num_head_P >= 0) & (target.num_head_P <= np.minimum(counts_P, 255)))
        and np.all(counts_P - target.num_head_P <= 255),
        "wrong number of entries at a position",
        "head and draws from 0 to 255 each",
    )
    in_head_E = head_mask(target.num_head_P, counts_P - target.num_head_P)
    _require_valid_entries(target, in_head_E, counts_P, head_tolerance)
    _require(
        np.all((target.realised_logprob_P <= 0) & np.isfinite(target.realised_logprob_P)),
        "a realised logprob is not one of a token that occurred",
        "finite, at most 0",
    )
    head_mass_P = np.bincount(
        np.repeat(np.arange(num_positions), target.num_head_P),
        target.weights_E[in_head_E].astype(np.float64),
        minlength=num_positions,
    )
    require_masses(
        head_mass_P,
        target.log_tail_mass_P,
        counts_P - target.num_head_P,
        target.threshold,
        NORMALISATION_TOLERANCE,
    )
    return in_head_E


def _require_valid_entries(
    target: SparseTarget, in_head_E: np.ndarray, counts_P: np.ndarray, tolerance: float
) -> None:
    ids_E, weights_E = target.ids_E, target.weights_E
    head_weights = weights_E[in_head_E]
    _require(
        np.all((head_weights >= target.threshold * (1 - tolerance)) & (head_weights <= 1)),
        "a head weight is no probability of the head",
        "threshold to 1",
    )
    _require(
        np.all(weights_E[~in_head_E] == np.float32(target.threshold)),
        "a draw's weight is not the threshold",
        f"{target.threshold}",
    )
    _require(
        np.all((ids_E >= 0) & (ids_E < VOCAB_SIZE)),
        "an id is out of range",
        f"0 to {VOCAB_SIZE - 1}",
    )
    rows_E = np.repeat(np.arange(len(counts_P)), counts_P)
    both_heads = (rows_E[1:] == rows_E[:-1]) & in_head_E[1:]
    _require(
        np.all((weights_E[1:] <= weights_E[:-1]) | ~both_heads),
        "a head is not sorted",
        "falling probability",
    )
    keys_E = np.sort(rows_E * VOCAB_SIZE + ids_E)  # four times faster than np.unique
    _require(np.all(keys_E[1:] != keys_E[:-1]), "an id occurs twice at a position", "distinct ids")


def require_masses(
    head_mass_P: np.ndarray,
    log_tail_mass_P: np.ndarray,
    num_draws_P: np.ndarray,
    threshold: float,
    tolerance: float,
) -> None:
    """A head and its tail hold mass 1, and systematic sampling takes tail/threshold draws, rounded down or up."""
    _require(np.all(log_tail_mass_P <= 0), "a log tail mass is not a logprob", "-inf to 0")
    tail_mass_P = np.exp(log_tail_mass_P.astype(np.float64))
    _require(
        np.all(np.abs(head_mass_P + tail_mass_P - 1) <= tolerance),
        "head and tail mass do not add up",
        f"1 to {tolerance:.3g}",
    )
    excess_P = np.abs(num_draws_P * threshold - tail_mass_P)
    _require(
        np.all(excess_P <= threshold + tolerance),
        "the number of draws is wrong",
        "tail / threshold",
    )


def head_mask(num_head_P: np.ndarray, num_draws_P: np.ndarray) -> np.ndarray:
    """Marks the head entries among all: bool [E]; the head of a position stands before its draws."""
    counts = np.empty(2 * len(num_head_P), dtype=np.int64)
    counts[0::2], counts[1::2] = num_head_P, num_draws_P
    return np.repeat(np.tile(np.array([True, False]), len(num_head_P)), counts)
