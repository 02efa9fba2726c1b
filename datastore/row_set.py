"""A set of row numbers, one bit a row, that yields its k-th member: 4.5 MB for 32 M rows. Pure."""

from __future__ import annotations

import hashlib

import numpy as np

_BLOCK_BYTES = 64
_BLOCK_ROWS = 8 * _BLOCK_BYTES


class RowSet:
    """Some of the rows 0..num_rows-1. size: how many are in the set."""

    def __init__(self, is_member_R: np.ndarray) -> None:
        """is_member_R: bool [num_rows]."""
        self.num_rows = len(is_member_R)
        padded = np.zeros(-(-self.num_rows // _BLOCK_ROWS) * _BLOCK_ROWS, dtype=bool)
        padded[: self.num_rows] = is_member_R
        self._bits_NB = np.packbits(padded).reshape(-1, _BLOCK_BYTES)
        # Members before each block of 512 rows; the last entry counts all.
        counts_N = padded.reshape(-1, _BLOCK_ROWS).sum(axis=1)
        self._before_N1 = np.concatenate([[0], np.cumsum(counts_N)])
        self.size = int(self._before_N1[-1])

    def select(self, ranks_K: np.ndarray) -> np.ndarray:
        """The members number `ranks_K` (from 0, each below `size`) in ascending order of rows: int64 [K].

        Raises IndexError for a number outside.
        """
        if ranks_K.size and not 0 <= int(ranks_K.min()) <= int(ranks_K.max()) < self.size:
            raise IndexError(f"members outside 0..{self.size - 1}")
        blocks_K = np.searchsorted(self._before_N1, ranks_K, side="right") - 1
        within_K = ranks_K - self._before_N1[blocks_K]
        bits_KR = np.unpackbits(self._bits_NB[blocks_K], axis=1)
        places_K = (bits_KR.cumsum(axis=1, dtype=np.int64) > within_K[:, None]).argmax(axis=1)
        return blocks_K * _BLOCK_ROWS + places_K

    def complement(self) -> RowSet:
        """The rows that are not in the set."""
        return RowSet(~self.mask())

    def mask(self) -> np.ndarray:
        """Membership of each row: bool [num_rows]."""
        return np.unpackbits(self._bits_NB.ravel(), count=self.num_rows).astype(bool)

    @property
    def sha256(self) -> str:
        """Hex sha256 of the membership bits, most significant first, the last byte filled with zeros."""
        return hashlib.sha256(self._bits_NB.tobytes()[: -(-self.num_rows // 8)]).hexdigest()
