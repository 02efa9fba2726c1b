"""What must hold inside rows, documents and their targets, beyond hashes: pure checks and recounts for `verify`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from common.errors import FormatError
from common.tokenizer import FIRST_CONTROL_ID, PAD, START
from datastore.budget import CLASSES, Budget, ClassBudget
from datastore.codec_target import MAX_REALISED_ERROR
from datastore.harmony import parse
from datastore.manifest import SpanTokens, SplitCounts
from datastore.target import class_masks
from datastore.types import SPAN_FINAL, SPAN_REASONING, DocTarget, PackedRow, SparseTarget, Split

_SPAN_OF_CHANNEL = {"analysis": SPAN_REASONING, "final": SPAN_FINAL}


def check_padding(row: PackedRow) -> None:
    """Raise FormatError unless all that follows the last document is padding: 199999 with span 0."""
    end = int(row.doc_ends_D[-1])
    wrong = np.flatnonzero((row.tokens_T[end:] != PAD) | (row.spans_T[end:] != 0))
    if wrong.size:
        position = end + int(wrong[0])
        raise FormatError(
            f"position {position} is padding",
            got=f"token {row.tokens_T[position]}, span {row.spans_T[position]}",
            expected=f"token {PAD}, span 0",
        )


def check_document(tokens_T: np.ndarray, spans_T: np.ndarray) -> None:
    """Raise FormatError unless the tokens are Harmony, end in analysis and final, and the spans are those of it."""
    messages = parse(tokens_T)
    shape = [(message.role, message.channel) for message in messages]
    closing = [("assistant", "analysis"), ("assistant", "final")]
    if shape[-2:] != closing or any(role == "assistant" for role, _ in shape[:-2]):
        raise FormatError(
            "the messages of a document",
            got=shape,
            expected="messages of others, then one analysis and one final of the assistant",
        )
    starts = np.flatnonzero(tokens_T == START)
    lengths = np.diff([*starts, len(tokens_T) - 1])
    tags = [_SPAN_OF_CHANNEL.get(message.channel or "", 0) for message in messages]
    expected_T = np.append(np.repeat(tags, lengths), 0)
    wrong = np.flatnonzero(expected_T != spans_T)
    if wrong.size:
        raise FormatError(
            f"the span of token {wrong[0]} of the document",
            got=int(spans_T[wrong[0]]),
            expected=int(expected_T[wrong[0]]),
        )


@dataclass
class RowTally:
    """Recounts a split row by row."""

    seq_len: int
    rows: int = 0
    documents: int = 0
    spans: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    control: int = 0

    def add(self, row: PackedRow) -> None:
        end = int(row.doc_ends_D[-1])
        spans_T, tokens_T = row.spans_T[:end], row.tokens_T[:end]
        self.rows += 1
        self.documents += len(row.doc_ids)
        # A tag above 2 is a fault of its document (check_document) and counts nowhere.
        self.spans += np.bincount(spans_T, minlength=3)[:3]
        self.control += int(np.count_nonzero(spans_T[tokens_T >= FIRST_CONTROL_ID]))

    def merge(self, other: RowTally) -> None:
        self.rows += other.rows
        self.documents += other.documents
        self.spans += other.spans
        self.control += other.control

    def counts(self) -> SplitCounts:
        tokens, positions = int(self.spans.sum()), self.rows * self.seq_len
        ignored, reasoning, final = self.spans.tolist()
        return SplitCounts(
            rows=self.rows,
            documents=self.documents,
            tokens=tokens,
            tokens_by_span=SpanTokens(ignored=ignored, reasoning=reasoning, final=final),
            control_targets=self.control,
            padding=positions - tokens,
            fill=tokens / positions if positions else 0.0,
        )


@dataclass
class TargetTally:
    """Recounts, from what is stored, the figures of an error budget that can be."""

    threshold: float
    blob_bytes: int = 0
    by_split: dict[Split, dict[str, int]] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=lambda: {c: np.zeros(6) for c in CLASSES})

    def add(
        self,
        split: Split,
        row: PackedRow,
        documents: list[DocTarget | None],
        target: SparseTarget,
        blob: bytes,
    ) -> None:
        """A row with targets. documents: as decoded from `blob`. target: `row_target` of them."""
        self.blob_bytes += len(blob)
        scored = [document for document in documents if document is not None]
        is_scored_D = np.array([document is not None for document in documents])
        counts = self.by_split.setdefault(split, {"documents": 0, "tokens": 0})
        counts["documents"] += len(scored)
        counts["tokens"] += int(np.diff(row.doc_ends_D, prepend=0)[is_scored_D].sum())
        entries_P = np.diff(target.offsets_P1)
        position_of_E = np.repeat(np.arange(len(entries_P)), entries_P)
        in_head_E = (
            np.arange(len(position_of_E))
            < (target.offsets_P1[:-1] + target.num_head_P)[position_of_E]
        )
        head_mass_P = np.bincount(
            position_of_E[in_head_E], target.weights_E[in_head_E], minlength=len(entries_P)
        )
        quantities_4P = np.stack(
            [
                entries_P,
                head_mass_P,
                np.exp(target.log_tail_mass_P.astype(np.float64)),
                target.realised_logprob_P.astype(np.float64),
            ]
        )
        masks = class_masks(row.tokens_T, row.spans_T, target.positions_P)
        for name, mask_P in masks.items():
            entropy = math.fsum(getattr(document.entropy_sums, name) for document in scored)
            summed = quantities_4P[:, mask_P].sum(axis=1)
            self.sums[name] += [np.count_nonzero(mask_P), *summed, entropy]

    def merge(self, other: TargetTally) -> None:
        self.blob_bytes += other.blob_bytes
        for split, counts in other.by_split.items():
            mine = self.by_split.setdefault(split, dict.fromkeys(counts, 0))
            for name, value in counts.items():
                mine[name] += value
        for name, sums in other.sums.items():
            self.sums[name] += sums

    def differences(self, budget: Budget) -> Iterator[str]:
        """Every figure of `budget` that the store contradicts, with what was found.

        Head and tail masses and realised logprobs may differ by what the codec may move them; counts are exact.
        """
        positions = int(self.sums["reasoning"][0] + self.sums["final"][0])
        if budget.positions != positions:
            yield f"positions: manifest {budget.positions}, stored {positions}"
        bytes_per_token = self.blob_bytes / max(positions, 1)
        if not math.isclose(budget.bytes_per_token, bytes_per_token, rel_tol=1e-9):
            yield f"bytes_per_token: manifest {budget.bytes_per_token}, stored {bytes_per_token}"
        for name in CLASSES:
            yield from self._class_differences(name, getattr(budget, name))

    def _class_differences(self, name: str, budget: ClassBudget | None) -> Iterator[str]:
        positions, *sums = self.sums[name].tolist()
        stated = budget.positions if budget else 0
        if stated != positions:
            yield f"{name}.positions: manifest {stated}, stored {positions:.0f}"
            return
        if budget is None:
            return
        entries, head_mass, tail_mass, realised, entropy = (value / positions for value in sums)
        checks = [
            ("entries", budget.entries, entries, 1e-9 * entries),
            ("head_mass", budget.head_mass, head_mass, self.threshold / 4),
            ("tail_mass", budget.tail_mass, tail_mass, self.threshold / 4),
            ("realised_logprob", budget.realised_logprob, realised, MAX_REALISED_ERROR),
            ("entropy", budget.entropy, entropy, 1e-6 + 1e-6 * entropy),
        ]
        for figure, stated_value, found, tolerance in checks:
            if not abs(stated_value - found) <= tolerance:
                yield f"{name}.{figure}: manifest {stated_value:.6g}, stored {found:.6g}"


def sum_differences(parts: Iterable[Budget], whole: Budget) -> Iterator[str]:
    """Every figure of `whole` that is not that of its parts together: means by positions, the worst KL their worst."""
    budgets = list(parts)
    positions = sum(budget.positions for budget in budgets)
    blob_bytes = sum(budget.bytes_per_token * budget.positions for budget in budgets)
    if positions != whole.positions:
        yield f"positions {positions}, the budget {whole.positions}"
    elif not math.isclose(blob_bytes, whole.bytes_per_token * positions, rel_tol=1e-9):
        yield f"bytes {blob_bytes:.6g}, the budget {whole.bytes_per_token * positions:.6g}"
    for name in CLASSES:
        values = [getattr(budget, name) for budget in budgets]
        found, stated = _together([v for v in values if v is not None]), getattr(whole, name)
        of_whole = _together([stated] if stated is not None else [])
        for figure, value in found.items():
            if not math.isclose(value, of_whole[figure], rel_tol=1e-9, abs_tol=1e-9):
                yield f"{name}.{figure} {value:.6g}, the budget {of_whole[figure]:.6g}"


def _together(parts: list[ClassBudget]) -> dict[str, float]:
    """Sums over positions of every figure of a class, but for the worst KL, which is a maximum."""
    figures = [name for name in ClassBudget.model_fields if name not in ("positions", "kl_max")]
    return {
        "positions": sum(part.positions for part in parts),
        "kl_max": max((part.kl_max for part in parts), default=0.0),
        **{name: math.fsum(getattr(p, name) * p.positions for p in parts) for name in figures},
    }


def duplicate_documents(doc_ids: bytes | bytearray | memoryview) -> np.ndarray:
    """Numbers of the documents whose id came before (int64, ascending); doc_ids: 16 bytes each, in order."""
    halves = np.frombuffer(doc_ids, ">u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    repeats = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    return np.sort(order[1:][repeats])
