"""Ids of a blob as few bits: codes by frequency, cells that grow with the code, raw bits within a cell. Pure.

An id's code is its place among the document's own tokens, by rank in the dataset's `IdOrder`, or, behind those, its
rank. Codes c fall into cells: octaves of c + 1, each cut into 2^resolution equal parts. Cells are bytes for zstd to
compress; the place within a cell is raw bits. Draws are a set, so they stand by rising code and their cells are
differences; the resolution grows with their number, so that differences are alike at every position.
docs/format.md, "Sparse target and codec", has the same in full.
"""

from __future__ import annotations

import numpy as np

from common.errors import FormatError
from common.tokenizer import VOCAB_SIZE
from datastore.id_order import IdOrder

# Codes stay below 2^18 - 1, so that 18 octaves hold them and a difference of cells fits in a byte.
MAX_OWN_IDS = 4096
HEAD_RESOLUTION, MAX_RESOLUTION = 1, 4
_CODE_BITS = 18
_CELLS = 256
_BEYOND = 1 << 20  # base of the cells that do not exist: no code is that high


def damaged(what: str) -> FormatError:
    return FormatError(f"target blob: {what}", remedy="score this shard again")


class DocumentCodes:
    """Codes of ids in one document. Built from its tokens and the order alone, so a decoder has the same."""

    def __init__(self, tokens_T: np.ndarray, order: IdOrder) -> None:
        self._order = order
        ranks_T = np.sort(order.ranks_V[tokens_T])
        is_first_T = np.ones(len(ranks_T), dtype=bool)
        is_first_T[1:] = ranks_T[1:] != ranks_T[:-1]
        self._own_ids = order.ids_V[ranks_T[is_first_T][:MAX_OWN_IDS]]

    def codes(self, ids_E: np.ndarray) -> np.ndarray:
        """The code of each id: int64 [E], distinct for distinct ids."""
        codes_V = self._order.ranks_V + np.int64(len(self._own_ids))
        codes_V[self._own_ids] = np.arange(len(self._own_ids))
        return codes_V[ids_E]

    def ids(self, codes_E: np.ndarray) -> np.ndarray:
        """The id of each code: int32 [E]. Raises FormatError on a code that no id has."""
        ranks_E = codes_E - len(self._own_ids)
        if ranks_E.max(initial=0) >= VOCAB_SIZE:
            raise damaged("an id is outside the vocabulary")
        own = np.flatnonzero(ranks_E < 0)
        ids_E = self._order.ids_V[ranks_E]  # of own ids something else, for a moment
        ids_E[own] = self._own_ids[codes_E[own]]
        return ids_E


def _cell_table() -> np.ndarray:
    """First code * 32 + number of raw bits of each cell, at [resolution * 256 + cell]: int64. One look-up for both."""
    bases = np.full((MAX_RESOLUTION + 1, _CELLS), _BEYOND)
    widths = np.zeros((MAX_RESOLUTION + 1, _CELLS), np.int64)
    for resolution in range(MAX_RESOLUTION + 1):
        cell = 0
        for octave in range(_CODE_BITS):
            parts = 1 << min(octave, resolution)
            width = (1 << octave) // parts
            last = cell + parts
            bases[resolution, cell:last] = (1 << octave) - 1 + width * np.arange(parts)
            widths[resolution, cell:last] = octave - min(octave, resolution)
            cell = last
    return (bases << 5 | widths).reshape(-1)


_TABLE = _cell_table()
# By number of draws: 1 -> 0, 2..3 -> 1, 4..7 -> 2, 8..15 -> 3, more -> 4.
_RESOLUTIONS = np.array(
    [min(max(count.bit_length() - 1, 0), MAX_RESOLUTION) for count in range(256)]
)


def cells_of(codes_E: np.ndarray, resolution_E: np.ndarray | int) -> np.ndarray:
    """The cell of each code: int64 [E]."""
    values_E = codes_E + 1
    octave_E = (values_E.astype(np.float64).view(np.int64) >> 52) - 1023  # exact below 2^53
    parts_E = np.minimum(octave_E, resolution_E)  # log2 of the cells of this octave
    before_E = (1 << parts_E) - 1 + ((octave_E - parts_E) << parts_E)
    return before_E + (values_E >> octave_E - parts_E) - (1 << parts_E)


def bases_of(cells_E: np.ndarray, resolution_E: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """First code of each cell, and the number of raw bits that lead from it to a code; any byte is a cell."""
    found_E = _TABLE[resolution_E * _CELLS + cells_E]
    return found_E >> 5, found_E & 31


def resolution_of(num_draws_P: np.ndarray) -> np.ndarray:
    """The resolution of a position's draws: int64 [P]."""
    return _RESOLUTIONS[num_draws_P]


def within_positions(values_E: np.ndarray, counts_P: np.ndarray) -> np.ndarray:
    """The sum of values from the first of each run of `counts_P` entries up to each entry: int64 [E]."""
    sums_E1 = np.zeros(len(values_E) + 1, np.int64)
    np.cumsum(values_E, out=sums_E1[1:])
    starts_P = np.cumsum(counts_P) - counts_P
    return sums_E1[1:] - np.repeat(sums_E1[starts_P], counts_P)


def pack_bits(values_N: np.ndarray, widths_N: np.ndarray) -> bytes:
    """Values of the given widths (0 to 18 bits) end to end, lowest bit first; the last byte is filled with zeros."""
    ends_N = np.cumsum(widths_N)
    num_bits = int(ends_N[-1]) if len(ends_N) else 0
    starts_N = ends_N - widths_N
    words = np.zeros(num_bits // 32 + 2, np.int64)
    word_N, windows_N = starts_N >> 5, values_N << (starts_N & 31)
    # Values share no bit, so that their sum is their union; a value reaches at most into the word behind its own.
    words += np.bincount(word_N, windows_N & 0xFFFFFFFF, len(words)).astype(np.int64)
    words[1:] += np.bincount(word_N, windows_N >> 32, len(words))[:-1].astype(np.int64)
    return words.astype("<u4").tobytes()[: (num_bits + 7) // 8]


def unpack_bits(content: memoryview, widths_N: np.ndarray) -> np.ndarray:
    """The values that `pack_bits` packed: int64 [N]. Raises FormatError unless `content` has just their bytes."""
    ends_N = np.cumsum(widths_N)
    num_bits = int(ends_N[-1]) if len(ends_N) else 0
    if len(content) != (num_bits + 7) // 8:
        raise damaged(f"{len(content)} bytes of raw bits, {num_bits} bits are needed")
    if num_bits % 8 and content[-1] >> num_bits % 8:
        raise damaged("its last raw byte is not filled with zeros")
    padded = bytes(content) + bytes(12 - len(content) % 4)
    words = np.frombuffer(padded, "<u4").astype(np.int64)
    windows = words[:-1] | words[1:] << 32
    starts_N = ends_N - widths_N
    return (windows[starts_N >> 5] >> (starts_N & 31)) & ((1 << widths_N) - 1)
