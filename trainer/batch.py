"""A micro-batch as tensors, from packed rows and their stored targets. Pure.

Legend: B rows, T positions of a row, K stored entries of a position (padded), N target positions of the batch,
C classes (reasoning, final, control). Convention: entry t scores the prediction of token t+1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from common.errors import AlignmentError
from common.tokenizer import FIRST_CONTROL_ID, PAD, VOCAB_SIZE
from datastore.rollout import ScoredTokens
from datastore.target import row_target
from datastore.types import DocTarget, PackedRow, SparseTarget

# One a document of a row, None where it was not scored.
RowTargets = Sequence[DocTarget | None]
# One a document of a row, None where the student did not sample it.
RowSamples = Sequence[ScoredTokens | None]
CLASSES = ("reasoning", "final", "control")
NO_DOCUMENT = -1
NO_TOP = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """What a training or evaluation step needs of B packed rows of T tokens.

    tokens_BT: int64. doc_ids_BT: int32, number of the document in its row, -1 on padding.
    labels_BT: int64, token t+1; PAD where position t has none (last token of a document, padding).
    label_spans_BT: uint8, span of token t+1; 0 where it is no target, so never across documents.
    is_control_BT: bool, the label is a target and a control id (>= 199998).
    target_index_N: int64, ascending flat indices (b * T + t) of the target positions: known on the host, so
        that selecting them never waits for a device.
    has_target_BT: bool, target positions of scored documents. target_ids_BTK: int32, target_weights_BTK: float32, its
        sparse target; unused entries have weight 0 and id 0. K is the longest of this batch, 0 without targets.
    target_num_head_BT: int32, how many of its entries, from the first, are the teacher's head; 0 without a target.
    target_log_tail_BT: float32, log of the teacher's mass outside the head; 0 without a target.
    teacher_logprob_BT: float32, the teacher's logprob of the label, exact where that was sampled; 0 where it was
        neither scored nor sampled.
    teacher_top_BT: int64, the teacher's most probable id; -1 where not scored or where no id reached the threshold.
    entropy_sums_C: float64, the teacher's exact entropy in nats summed over the scored targets of each class.
    sampled_BT: bool, the label is a target that the student sampled. sampling_logprob_BT: float32, its logprob under
        the weights that sampled it; 0 elsewhere.
    """

    tokens_BT: torch.Tensor
    doc_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    label_spans_BT: torch.Tensor
    is_control_BT: torch.Tensor
    target_index_N: torch.Tensor
    has_target_BT: torch.Tensor
    target_ids_BTK: torch.Tensor
    target_weights_BTK: torch.Tensor
    target_num_head_BT: torch.Tensor
    target_log_tail_BT: torch.Tensor
    teacher_logprob_BT: torch.Tensor
    teacher_top_BT: torch.Tensor
    entropy_sums_C: torch.Tensor
    sampled_BT: torch.Tensor
    sampling_logprob_BT: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Any) -> Batch:
        return Batch(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


def make_batch(
    rows: Sequence[PackedRow],
    documents: Sequence[RowTargets | None] | None = None,
    sampled: Sequence[RowSamples | None] | None = None,
) -> Batch:
    """The batch of `rows` (at least one, all of one length) with their targets, None where a row uses none.

    `documents` holds per row what `TargetStore.documents` returns; left out, no row uses targets. `sampled` holds per
    row the logprobs of each document that the student sampled, of all target tokens of that document; it may come
    without targets. Raises AlignmentError when targets belong to other tokens, miss a target position or hold an
    impossible entry, and when logprobs are not as many as the targets of their document or impossible.
    """
    documents = [None] * len(rows) if documents is None else documents
    sampled = [None] * len(rows) if sampled is None else sampled
    tokens_BT = np.stack([row.tokens_T for row in rows])
    doc_ids_BT = _document_numbers(rows, tokens_BT.shape[1])
    label_spans_BT = _shift_within(np.stack([row.spans_T for row in rows]), doc_ids_BT, 0)
    labels_BT = _shift_within(tokens_BT, doc_ids_BT, PAD)
    is_target_BT = label_spans_BT != 0
    targets = [
        None if of_row is None else row_target(of_row, row)
        for row, of_row in zip(rows, documents, strict=True)
    ]
    tensors = _dense_targets(targets, tokens_BT.shape[1])
    tensors |= _sampled_tensors(rows, sampled, is_target_BT, tensors["teacher_logprob_BT"])
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BT.astype(np.int64)),
        doc_ids_BT=torch.from_numpy(doc_ids_BT),
        labels_BT=torch.from_numpy(labels_BT.astype(np.int64)),
        label_spans_BT=torch.from_numpy(label_spans_BT),
        is_control_BT=torch.from_numpy(is_target_BT & (labels_BT >= FIRST_CONTROL_ID)),
        target_index_N=torch.from_numpy(np.flatnonzero(is_target_BT)),
        entropy_sums_C=torch.from_numpy(_entropy_sums(documents)),
        **tensors,
    )


def _document_numbers(rows: Sequence[PackedRow], num_tokens: int) -> np.ndarray:
    """Number of each token's document, int32 [B, T], -1 on padding."""
    doc_ids_BT = np.empty((len(rows), num_tokens), dtype=np.int32)
    for b, row in enumerate(rows):
        lengths_N = np.diff(np.concatenate([[0], row.doc_ends_D]), append=num_tokens)
        numbers_N = np.arange(len(lengths_N), dtype=np.int32)
        numbers_N[-1] = NO_DOCUMENT
        doc_ids_BT[b] = np.repeat(numbers_N, lengths_N)
    return doc_ids_BT


def _shift_within(values_BT: np.ndarray, doc_ids_BT: np.ndarray, fill: int) -> np.ndarray:
    """Entry t holds the value of t+1 if both lie in one document, else `fill`."""
    shifted_BT = np.full_like(values_BT, fill)
    same_BS = (doc_ids_BT[:, :-1] == doc_ids_BT[:, 1:]) & (doc_ids_BT[:, 1:] != NO_DOCUMENT)
    shifted_BT[:, :-1] = np.where(same_BS, values_BT[:, 1:], fill)
    return shifted_BT


def _entropy_sums(documents: Sequence[RowTargets | None]) -> np.ndarray:
    scored = [document for of_row in documents if of_row for document in of_row if document]
    sums = [document.entropy_sums for document in scored]
    per_document = [[getattr(each, name) for name in CLASSES] for each in sums]
    return np.array(per_document, dtype=np.float64).reshape(-1, len(CLASSES)).sum(axis=0)


def _dense_targets(
    targets: Sequence[SparseTarget | None], num_positions: int
) -> dict[str, torch.Tensor]:
    """CSR of every row into padded arrays over all positions of the batch."""
    shape = len(targets), num_positions
    scored = [
        (b, target, _num_entries(target)) for b, target in enumerate(targets) if target is not None
    ]
    width = max((int(counts_P.max(initial=0)) for _, _, counts_P in scored), default=0)
    ids_BTK = np.zeros((*shape, width), dtype=np.int32)
    weights_BTK = np.zeros((*shape, width), dtype=np.float32)
    logprob_BT = np.zeros(shape, dtype=np.float32)
    log_tail_BT = np.zeros(shape, dtype=np.float32)
    num_head_BT = np.zeros(shape, dtype=np.int32)
    top_BT = np.full(shape, NO_TOP, dtype=np.int64)
    has_target_BT = np.zeros(shape, dtype=bool)
    for b, target, counts_P in scored:
        _require_possible(target, counts_P)
        at_P, starts_P = target.positions_P, target.offsets_P1[:-1]
        # One flat index for both arrays: an index of row, position and column takes three times as long.
        flat_E = np.repeat(at_P.astype(np.int64) * width - starts_P, counts_P)
        flat_E += np.arange(len(flat_E))
        ids_BTK[b].reshape(-1)[flat_E] = target.ids_E
        weights_BTK[b].reshape(-1)[flat_E] = target.weights_E
        num_head_BT[b, at_P] = target.num_head_P
        log_tail_BT[b, at_P] = target.log_tail_mass_P
        logprob_BT[b, at_P] = target.realised_logprob_P
        top_BT[b, at_P] = np.where(target.num_head_P > 0, target.ids_E[starts_P], NO_TOP)
        has_target_BT[b, at_P] = True
    return {
        "has_target_BT": torch.from_numpy(has_target_BT),
        "target_ids_BTK": torch.from_numpy(ids_BTK),
        "target_weights_BTK": torch.from_numpy(weights_BTK),
        "target_num_head_BT": torch.from_numpy(num_head_BT),
        "target_log_tail_BT": torch.from_numpy(log_tail_BT),
        "teacher_logprob_BT": torch.from_numpy(logprob_BT),
        "teacher_top_BT": torch.from_numpy(top_BT),
    }


def _sampled_tensors(
    rows: Sequence[PackedRow],
    sampled: Sequence[RowSamples | None],
    is_target_BT: np.ndarray,
    teacher_logprob_BT: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """sampled_BT and sampling_logprob_BT; the teacher's exact logprobs are written into `teacher_logprob_BT`."""
    sampled_BT = np.zeros(is_target_BT.shape, dtype=bool)
    sampling_logprob_BT = np.zeros(is_target_BT.shape, dtype=np.float32)
    for b, (row, of_row) in enumerate(zip(rows, sampled, strict=True)):
        if of_row is None:
            continue
        slices = row.documents()
        if len(of_row) != len(slices):
            raise AlignmentError(
                "sampled tokens of a row", got=f"{len(of_row)} documents", expected=f"{len(slices)}"
            )
        for number, tokens in enumerate(of_row):
            if tokens is not None:
                where = slices[number]
                at_S = where.start + np.flatnonzero(is_target_BT[b, where])
                _require_sampled(tokens, len(at_S), f"document {number} of row {b} of the batch")
                sampled_BT[b, at_S] = True
                sampling_logprob_BT[b, at_S] = tokens.sampling_logprob_S
                teacher_logprob_BT.numpy()[b, at_S] = tokens.teacher_logprob_S
    return {
        "sampled_BT": torch.from_numpy(sampled_BT),
        "sampling_logprob_BT": torch.from_numpy(sampling_logprob_BT),
    }


def _require_sampled(tokens: ScoredTokens, num_targets: int, document: str) -> None:
    for of, logprob_S in (
        ("the student", tokens.sampling_logprob_S),
        ("the teacher", tokens.teacher_logprob_S),
    ):
        if len(logprob_S) != num_targets:
            raise AlignmentError(
                f"logprobs of {of} for the sampled tokens of {document}",
                got=f"{len(logprob_S)}",
                expected=f"{num_targets}, one a target of the document",
            )
        wrong_S = ~(np.isfinite(logprob_S) & (logprob_S <= 0))
        if np.any(wrong_S):
            first = int(np.argmax(wrong_S))
            raise AlignmentError(
                f"logprob of {of} for sampled token {first} of {document}",
                got=f"{logprob_S[first]}",
                expected="a finite number, at most 0",
            )


def _num_entries(target: SparseTarget) -> np.ndarray:
    return np.diff(target.offsets_P1)


def _require_possible(target: SparseTarget, counts_P: np.ndarray) -> None:
    """AlignmentError for entries that no loss can use; that they stand at the right positions `row_target` checked.

    counts_P: entries of each position.
    """
    if not np.all(counts_P > 0):
        empty = int(target.positions_P[np.argmin(counts_P)])
        raise AlignmentError(
            f"position {empty} of a scored document has no entry",
            remedy="score this dataset again",
        )
    if not np.all((target.num_head_P >= 0) & (target.num_head_P <= counts_P)):
        raise AlignmentError("a scored position has more head entries than entries")
    # Seen as unsigned a negative id is a large one: one pass instead of three.
    if len(target.ids_E) and int(target.ids_E.view(np.uint32).max()) >= VOCAB_SIZE:
        raise AlignmentError(
            "a teacher entry lies outside the vocabulary",
            got=f"ids {target.ids_E.min()} to {target.ids_E.max()}",
            expected=f"0 to {VOCAB_SIZE - 1}",
        )
    weights_E, logprob_P = target.weights_E, target.realised_logprob_P
    if not (
        # NaN fails both comparisons.
        np.all(weights_E > 0)
        and np.all(weights_E < np.inf)
        and np.all(np.isfinite(logprob_P))
        and not np.any(np.isnan(target.log_tail_mass_P))
    ):
        raise AlignmentError(
            "a teacher entry is no number", expected="weights > 0 and finite logprobs"
        )
