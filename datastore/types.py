"""The records at the borders of the river. Read this first; docs/format.md has the same on disk.

Legend of shape suffixes: T positions of a document or a packed row, D documents of a row, P scored positions,
E entries of sparse targets (CSR over P), V vocabulary.
Convention: entry t scores the prediction of token t+1. Logprobs are natural-log.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

SPAN_IGNORED, SPAN_REASONING, SPAN_FINAL = 0, 1, 2
SPAN_NAMES = {SPAN_REASONING: "reasoning", SPAN_FINAL: "final"}
Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """One SYNTH row, the fields that rendering and filters use. Text is never repaired."""

    synth_id: str | None
    query: str | None
    synthetic_reasoning: str | None
    synthetic_answer: str | None
    exercise: str | None
    constraints: str | None
    language: str | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RenderedDoc:
    """One document in Harmony.

    doc_id: 16 bytes, blake2b-128 of synth_id in UTF-8. tokens_T: int32. spans_T: uint8.
    language, exercise: of the source row, "" where it has none.
    analysis_cut, user_cut: content tokens that truncation removed from the left of that message.
    """

    doc_id: bytes
    tokens_T: np.ndarray
    spans_T: np.ndarray
    language: str
    exercise: str
    analysis_cut: int = 0
    user_cut: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedRow:
    """One training sequence of fixed length L: whole documents back to back, then padding.

    Example, L=8, documents of 3 and 4 tokens: doc_ends_D=[3, 7]; position 7 is padding (199999, span 0).
    tokens_T: int32 [L]. spans_T: uint8 [L]. doc_ends_D: int32, exclusive ends, ascending.
    doc_ids: one 16-byte id a document.
    languages, exercises: one text a document, of its source row, "" where it has none.
    row_hash: see docs/format.md.
    """

    tokens_T: np.ndarray
    spans_T: np.ndarray
    doc_ends_D: np.ndarray
    doc_ids: tuple[bytes, ...]
    languages: tuple[str, ...]
    exercises: tuple[str, ...]
    row_hash: int

    def documents(self) -> list[slice]:
        """The slice of positions of each document."""
        return [slice(*ends) for ends in itertools.pairwise([0, *self.doc_ends_D.tolist()])]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseTarget:
    """Teacher targets of P scored positions, in CSR: position p owns entries offsets_P1[p]:offsets_P1[p+1].

    The first num_head_P[p] entries of a position are its head (every id with teacher probability >= threshold,
    by falling probability) with their logprobs; the others are systematic draws of the rest, in any order, each
    carrying weight `threshold`. The weights of a position estimate the teacher's distribution without bias; they
    sum to 1 only in expectation.

    positions_P: int32, the position t of each (document or row coordinates, as the function that made it says).
    num_head_P: int32. offsets_P1: int64 [P+1]. ids_E: int32. weights_E: float32 (head: exp(logprob); draw: threshold).
    realised_logprob_P: float32, teacher logprob of token t+1. log_tail_mass_P: float32, log of the mass outside
    the head (-inf when the head holds all).
    entropy_P: float32, the teacher's exact entropy in nats; None after decoding, where only the sums per document
    and class are stored (`TargetSums`).
    """

    threshold: float
    positions_P: np.ndarray
    num_head_P: np.ndarray
    offsets_P1: np.ndarray
    ids_E: np.ndarray
    weights_E: np.ndarray
    realised_logprob_P: np.ndarray
    log_tail_mass_P: np.ndarray
    entropy_P: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSums:
    """Exact teacher entropy in nats summed over the targets of one document, per class.

    `control` counts the targets whose token t+1 is a control id (>= 199998); they are in their span's sum too.
    """

    reasoning: float
    final: float
    control: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DocTarget:
    """The stored targets of one document; positions count from the document's first token.

    content_key: uint64, xxh3_64 of the document's tokens as little-endian int32 (what it was scored for).
    """

    content_key: int
    target: SparseTarget
    entropy_sums: TargetSums
