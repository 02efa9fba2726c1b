"""Which documents a teacher is to score: a share of the rows, and filters on documents. Pure.

A row is chosen whole by the hash of its documents' ids, so that the share of scored rows, which a run mixes by, is the
fraction; filters choose among the documents of a chosen row, so a row may be scored in part. A larger fraction keeps
every row of a smaller one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from pydantic import Field, field_validator, model_validator

from common.config import Config
from common.errors import ConfigError
from datastore.split import split_bound
from datastore.types import PackedRow


class Selection(Config):
    """fraction: share of packed rows, as the decimal number that is written. The others filter documents.

    languages, exercises: labels to keep, all when empty. min_tokens, max_tokens: length of a document, both included.
    """

    fraction: float = Field(default=1.0, gt=0, le=1)
    languages: tuple[str, ...] = ()
    exercises: tuple[str, ...] = ()
    min_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)

    @field_validator("languages", "exercises")
    @classmethod
    def _canonical(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Sorted, each once: the same selection is written in one way only."""
        return tuple(sorted(set(labels)))

    @model_validator(mode="after")
    def _ordered(self) -> Selection:
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self

    @property
    def is_everything(self) -> bool:
        """Whether every document of any dataset is selected."""
        return self == Selection()

    def documents(self, row: PackedRow) -> np.ndarray:
        """The documents of a row that are to be scored: bool [D]."""
        if self.fraction < 1 and row_hash_of_ids(row.doc_ids) >= split_bound(self.fraction):
            return np.zeros(len(row.doc_ids), dtype=bool)
        return self.passing(row)

    def passing(self, row: PackedRow) -> np.ndarray:
        """The documents of a row that pass the filters, whatever the fraction: bool [D]."""
        lengths_D = np.diff(row.doc_ends_D, prepend=0)
        passes_D = np.ones(len(lengths_D), dtype=bool)
        if self.languages:
            passes_D &= _among(row.languages, self.languages)
        if self.exercises:
            passes_D &= _among(row.exercises, self.exercises)
        if self.min_tokens is not None:
            passes_D &= lengths_D >= self.min_tokens
        if self.max_tokens is not None:
            passes_D &= lengths_D <= self.max_tokens
        return passes_D


def row_hash_of_ids(doc_ids: tuple[bytes, ...]) -> int:
    """blake2b-64 of a row's document ids, joined, as a big-endian number: below 2^64, the same in every dataset."""
    return int.from_bytes(hashlib.blake2b(b"".join(doc_ids), digest_size=8).digest(), "big")


def require_match(selection: Selection, rows: Iterable[PackedRow]) -> None:
    """ConfigError unless some document is selected and every label that a filter names occurs.

    Reads no more rows than it takes to be sure; without filters that is the first one.
    """
    languages, exercises = set(selection.languages), set(selection.exercises)
    is_matched = False
    for row in rows:
        languages.difference_update(row.languages)
        exercises.difference_update(row.exercises)
        is_matched = is_matched or bool(selection.documents(row).any())
        if is_matched and not languages and not exercises:
            return
    absent = [*sorted(languages), *sorted(exercises)]
    raise ConfigError(
        "the selection matches no document of the dataset"
        if not is_matched
        else "a filter names what no document of the dataset has",
        got=", ".join(map(repr, absent)) or selection.resolved(),
        remedy="`vpmoe-data inspect` shows the language and exercise of documents; correct the filters",
    )


def _among(labels: tuple[str, ...], kept: tuple[str, ...]) -> np.ndarray:
    return np.array([label in kept for label in labels], dtype=bool)
