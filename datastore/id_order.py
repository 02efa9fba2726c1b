"""The order of ids that a target store counts by: falling frequency in its dataset, so that usual ids cost few bits.

targets/<teacher>/id_order.bin holds it as little-endian uint32 [V], rank -> id; the target manifest has its sha256.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import FormatError
from common.files import sha256_bytes, write_bytes
from common.tokenizer import VOCAB_SIZE
from datastore.types import SPAN_IGNORED, PackedRow

if TYPE_CHECKING:
    from datastore.reader import Dataset

NAME = "id_order.bin"
# Targets that are counted: ids rarer than one in 16 million keep the tokenizer's order, which falls as well.
COUNTED_TARGETS = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class IdOrder:
    """A permutation of the ids 0..201087. ids_V: int32, rank -> id. ranks_V: int32, id -> rank. sha256: of the file."""

    ids_V: np.ndarray
    ranks_V: np.ndarray
    sha256: str

    @classmethod
    def of(cls, ids_V: np.ndarray) -> IdOrder:
        """The order with these ids by rank. Raises FormatError unless each id of the vocabulary occurs once."""
        ids_V = np.asarray(ids_V).astype(np.int32)
        return cls(ids_V, _inverse(ids_V), sha256_bytes(_as_bytes(ids_V)))

    @classmethod
    def identity(cls) -> IdOrder:
        """Every id at its own rank: the order of a dataset without targets."""
        return cls.of(np.arange(VOCAB_SIZE))

    @classmethod
    def read(cls, folder: Path, sha256: str) -> IdOrder:
        """The order in a target folder. Raises FormatError when it is absent or is not the one of this sha256."""
        path = Path(folder) / NAME
        remedy = "restore the file, or score the dataset again"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise FormatError(f"{path} is missing", remedy=remedy) from None
        if (found := sha256_bytes(content)) != sha256:
            raise FormatError(
                f"{path} is not the order of these targets",
                got=f"sha256 {found}",
                expected=sha256 or "a manifest that names one",
                remedy=remedy,
            )
        ids_V = np.frombuffer(content, "<u4").astype(np.int32)
        return cls(ids_V, _inverse(ids_V), sha256)

    def write(self, folder: Path) -> None:
        """Write targets/<teacher>/id_order.bin atomically."""
        write_bytes(Path(folder) / NAME, _as_bytes(self.ids_V))


def _inverse(ids_V: np.ndarray) -> np.ndarray:
    in_range = ids_V[(ids_V >= 0) & (ids_V < VOCAB_SIZE)]
    ranks_V = np.full(VOCAB_SIZE, -1, np.int32)
    ranks_V[in_range] = np.arange(len(in_range), dtype=np.int32)
    if len(ids_V) != VOCAB_SIZE or ranks_V.min() < 0:
        raise FormatError(
            "an order of ids",
            got=f"{len(ids_V)} ids, {np.count_nonzero(ranks_V >= 0)} of them distinct and valid",
            expected=f"each of 0..{VOCAB_SIZE - 1} once",
        )
    return ranks_V


def _as_bytes(ids_V: np.ndarray) -> bytes:
    return ids_V.astype("<u4").tobytes()


def count_order(dataset: Dataset) -> IdOrder:
    """The order by the dataset's first targets (train, then valid)."""
    return order_of_rows(dataset.rows())


def order_of_rows(rows: Iterable[PackedRow]) -> IdOrder:
    """Ids by falling count among the first 2^24 targets of the rows, equal counts by id."""
    counts_V = np.zeros(VOCAB_SIZE, np.int64)
    counted = 0
    for row in rows:
        targets = row.tokens_T[row.spans_T != SPAN_IGNORED]
        counts_V += np.bincount(targets, minlength=VOCAB_SIZE)
        counted += len(targets)
        if counted >= COUNTED_TARGETS:
            break
    return IdOrder.of(np.argsort(-counts_V, kind="stable"))
