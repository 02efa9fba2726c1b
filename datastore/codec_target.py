"""The scored positions of a row as streams of bytes and raw bits, and back. Pure, vectorised.

`datastore/codec_ids.py` codes ids, `datastore/codec_masses.py` logprobs; here they become streams of one kind each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import FormatError
from datastore.codec_ids import (
    HEAD_RESOLUTION,
    DocumentCodes,
    bases_of,
    cells_of,
    damaged,
    pack_bits,
    resolution_of,
    unpack_bits,
    within_positions,
)
from datastore.codec_masses import (
    MAX_HEAD_ERROR,
    Shape,
    head_weights,
    quantise_head,
    quantise_realised,
    quantise_tail,
    realised_logprobs,
    tail_masses,
)
from datastore.id_order import IdOrder
from datastore.target import (
    NORMALISATION_TOLERANCE,
    position_uniforms,
    require_masses,
    target_positions,
)
from datastore.types import PackedRow, SparseTarget

MAX_REALISED_ERROR = 3 / 64


@dataclass(frozen=True, slots=True)
class Scored:
    """What the row itself says about its scored documents.

    numbers: of the documents in the row, ascending. positions: of each of them, int32 [P]. codes: of its ids.
    realised_P: int64, token t+1 of every scored position, documents end to end.
    """

    numbers: list[int]
    positions: list[np.ndarray]
    codes: list[DocumentCodes]
    realised_P: np.ndarray

    @classmethod
    def of(cls, row: PackedRow, numbers: list[int], order: IdOrder) -> Scored:
        """Look at these documents of a row. Raises FormatError when the first token of one is a target."""
        slices = [row.documents()[number] for number in numbers]
        positions = [target_positions(row.tokens_T[doc], row.spans_T[doc]) for doc in slices]
        places = [doc.start + at + 1 for doc, at in zip(slices, positions, strict=True)]
        return cls(
            numbers,
            positions,
            [DocumentCodes(row.tokens_T[doc], order) for doc in slices],
            row.tokens_T[np.concatenate(places)].astype(np.int64),
        )

    def uniforms_P(self, content_keys: list[int]) -> np.ndarray:
        """The uniform number of every position, given each document's content key: float64."""
        pairs = zip(content_keys, self.positions, strict=True)
        return np.concatenate([position_uniforms(key, positions_P) for key, positions_P in pairs])

    def spans(self, counts_P: np.ndarray) -> list[slice]:
        """Where the entries of each document lie when every position has `counts_P` of them."""
        ends_P1 = np.zeros(len(counts_P) + 1, np.int64)
        np.cumsum(counts_P, out=ends_P1[1:])
        ends = ends_P1[np.cumsum([len(positions_P) for positions_P in self.positions])].tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def encode_target(
    target: SparseTarget, in_head_E: np.ndarray, scored: Scored, shape: Shape
) -> tuple[list[bytes], bytes]:
    """The streams of a valid target, in the order of docs/format.md, and its raw bits.

    Raises FormatError when draws, masses and realised logprobs do not belong together.
    """
    num_head_P, num_draws_P = shape.num_head_P, shape.num_draws_P
    head_ids = target.ids_E[in_head_E].astype(np.int64)
    hits = np.flatnonzero(head_ids == np.repeat(scored.realised_P, num_head_P))
    place_P = _places(hits, num_head_P)
    head_codes = _codes(head_ids, num_head_P, scored)
    head_codes = np.delete(head_codes, hits)
    head_cells = cells_of(head_codes, HEAD_RESOLUTION)
    head_bases, head_widths = bases_of(head_cells, HEAD_RESOLUTION)
    draw_codes = _codes(target.ids_E[~in_head_E], num_draws_P, scored)
    draw_steps, draw_raw, draw_widths = _encode_draws(draw_codes, num_draws_P)

    tail_P = np.exp(target.log_tail_mass_P.astype(np.float64))
    _require_cells(shape, tail_P)
    tail_steps, tail_raw_P = quantise_tail(shape, tail_P)
    head_steps = quantise_head(target.weights_E[in_head_E], num_head_P)
    stored_tail_P, _ = tail_masses(shape, tail_steps, tail_raw_P)
    stored_H = head_weights(head_steps, num_head_P, stored_tail_P)
    _require_close(stored_H, target.weights_E[in_head_E])
    base_P = _bases(stored_H, hits, place_P)
    realised_P = target.realised_logprob_P.astype(np.float64)
    _require_agreement(realised_P, base_P, place_P, shape.threshold)
    whole, realised_raw_P = quantise_realised(realised_P, shape, place_P, base_P)

    seconds, later_H = _second_and_later(num_head_P)
    streams = [
        num_head_P,
        num_draws_P,
        place_P[num_head_P > 0],
        head_steps[seconds],
        head_steps[later_H],
        tail_steps,
        head_cells,
        draw_steps,
        whole,
    ]
    raw = [head_codes - head_bases, draw_raw, tail_raw_P, realised_raw_P]
    widths = [head_widths, draw_widths, shape.tail_widths(), shape.realised_widths(place_P)]
    return (
        [stream.astype(np.uint8).tobytes() for stream in streams],
        pack_bits(np.concatenate(raw), np.concatenate(widths)),
    )


def _codes(ids_E: np.ndarray, counts_P: np.ndarray, scored: Scored) -> np.ndarray:
    pairs = zip(scored.codes, scored.spans(counts_P), strict=True)
    return np.concatenate([codes.codes(ids_E[where]) for codes, where in pairs])


def _ids(codes_E: np.ndarray, counts_P: np.ndarray, scored: Scored) -> np.ndarray:
    pairs = zip(scored.codes, scored.spans(counts_P), strict=True)
    return np.concatenate([codes.ids(codes_E[where]) for codes, where in pairs])


def _encode_draws(
    codes_S: np.ndarray, num_draws_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences of cells along the rising codes of each position, and the raw bits: (steps, values, widths)."""
    position_S = np.repeat(np.arange(len(num_draws_P)), num_draws_P)
    codes_S = np.sort(position_S << 32 | codes_S) & 0xFFFFFFFF
    resolution_S = np.repeat(resolution_of(num_draws_P), num_draws_P)
    cells_S = cells_of(codes_S, resolution_S)
    steps_S = np.diff(cells_S, prepend=0)
    starts = _starts(num_draws_P)[num_draws_P > 0]
    steps_S[starts] = cells_S[starts]
    bases_S, widths_S = bases_of(cells_S, resolution_S)
    return steps_S, codes_S - bases_S, widths_S


def _starts(counts_P: np.ndarray) -> np.ndarray:
    return np.cumsum(counts_P) - counts_P


def _places(hits: np.ndarray, num_head_P: np.ndarray) -> np.ndarray:
    """Place of the realised token in each head, counted from 1; 0 where it is not in it: int64 [P]."""
    positions = np.repeat(np.arange(len(num_head_P)), num_head_P)[hits]
    place_P = np.zeros(len(num_head_P), np.int64)
    place_P[positions] = hits - _starts(num_head_P)[positions] + 1
    return place_P


def _bases(weights_H: np.ndarray, hits: np.ndarray, place_P: np.ndarray) -> np.ndarray:
    """Logprob of the realised token's head entry, 0 where it has none: float64 [P]."""
    base_P = np.zeros(len(place_P))
    base_P[place_P > 0] = np.log(weights_H[hits])
    return base_P


def _second_and_later(num_head_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the second entries of heads are, and marks of those behind them (bool [H])."""
    starts_P = _starts(num_head_P)
    seconds = starts_P[num_head_P > 1] + 1
    later_H = np.ones(int(num_head_P.sum()), dtype=bool)
    later_H[starts_P[num_head_P > 0]] = False
    later_H[seconds] = False
    return seconds, later_H


def _require_cells(shape: Shape, tail_P: np.ndarray) -> None:
    off_P = np.maximum(shape.low_P - tail_P, tail_P - shape.high_P)[shape.num_head_P > 0]
    if off_P.max(initial=0.0) > NORMALISATION_TOLERANCE:
        raise FormatError(
            "sparse target: the number of draws is not that of the document's uniform numbers",
            got=f"a tail mass {off_P.max():.3g} outside its cell",
            expected=f"at most {NORMALISATION_TOLERANCE}",
        )


def _require_close(stored_H: np.ndarray, weights_H: np.ndarray) -> None:
    error = np.abs(np.log(stored_H) - np.log(weights_H.astype(np.float64))).max(initial=0.0)
    if not error <= MAX_HEAD_ERROR + NORMALISATION_TOLERANCE:
        raise FormatError(
            "sparse target: a head and its tail do not fit together",
            got=f"a head logprob that storing would move by {error:.3g}",
            expected=f"at most {MAX_HEAD_ERROR:.3g}",
        )


def _require_agreement(
    realised_P: np.ndarray, base_P: np.ndarray, place_P: np.ndarray, threshold: float
) -> None:
    """A realised token in the head has that entry's logprob; another one lies below the threshold."""
    inside_P = place_P > 0
    limit = MAX_HEAD_ERROR + MAX_REALISED_ERROR
    apart = np.abs(realised_P - base_P)[inside_P].max(initial=0.0)
    above = (realised_P[~inside_P] - np.log(threshold)).max(initial=0.0)
    if not (apart <= limit and above <= NORMALISATION_TOLERANCE):
        raise FormatError(
            "sparse target: a realised logprob disagrees with the head",
            got=f"{apart:.3g} from its entry, {above:.3g} above the threshold without one",
            expected=f"at most {limit:.3g} and {NORMALISATION_TOLERANCE}",
        )


class Fields:
    """Takes one array after another from a payload; FormatError where it ends too early."""

    def __init__(self, payload: bytes) -> None:
        self.payload, self.at = payload, 0

    def take(self, dtype: str, count: int) -> np.ndarray:
        """`count` values of a dtype, as a view."""
        end = self.at + np.dtype(dtype).itemsize * count
        if end > len(self.payload):
            raise damaged("its payload is shorter than its counts")
        values = np.frombuffer(self.payload, dtype, count, self.at)
        self.at = end
        return values

    def stream(self, count: int | np.integer) -> np.ndarray:
        """`count` bytes as int64."""
        return self.take("u1", int(count)).astype(np.int64)

    def finish(self) -> None:
        """FormatError when something is left."""
        if self.at != len(self.payload):
            raise damaged("its payload is longer than its counts")


@dataclass(frozen=True, slots=True)
class _Streams:
    """What the payload holds of a target. Names as in docs/format.md."""

    place_P: np.ndarray
    head_steps: np.ndarray
    tail_steps: np.ndarray
    head_cells: np.ndarray
    draw_steps: np.ndarray
    whole: np.ndarray

    @classmethod
    def take(cls, fields: Fields, shape: Shape) -> _Streams:
        num_head_P = shape.num_head_P
        place_P = np.zeros(len(num_head_P), np.int64)
        place_P[num_head_P > 0] = fields.stream(np.count_nonzero(num_head_P))
        if np.any(place_P > num_head_P):
            raise damaged("a realised token stands behind the end of its head")
        seconds, later_H = _second_and_later(num_head_P)
        head_steps = np.zeros(len(later_H), np.int64)
        head_steps[seconds] = fields.stream(len(seconds))
        head_steps[later_H] = fields.stream(np.count_nonzero(later_H))
        streams = cls(
            place_P,
            head_steps,
            fields.stream(np.count_nonzero(shape.stepped_P)),
            fields.stream(len(later_H) - np.count_nonzero(place_P)),
            fields.stream(int(shape.num_draws_P.sum())),
            fields.stream(np.count_nonzero(place_P == 0)),
        )
        fields.finish()
        return streams


def decode_target(fields: Fields, raw: memoryview, scored: Scored, shape: Shape) -> SparseTarget:
    """The target of all scored positions, from what follows the counts in the payload, and the raw bits."""
    num_head_P, num_draws_P = shape.num_head_P, shape.num_draws_P
    streams = _Streams.take(fields, shape)
    place_P = streams.place_P
    bases, id_widths = _cells(streams, num_draws_P)
    widths = [id_widths, shape.tail_widths(), shape.realised_widths(place_P)]
    id_raw, tail_raw_P, realised_raw_P = np.split(
        unpack_bits(raw, np.concatenate(widths)), np.cumsum([len(part) for part in widths[:-1]])
    )
    head_codes, draw_codes = np.split(bases + id_raw, [len(streams.head_cells)])
    _require_rising(draw_codes, num_draws_P)

    tail_P, log_tail_P = tail_masses(shape, streams.tail_steps, tail_raw_P)
    require_masses(1 - tail_P, log_tail_P, num_draws_P, shape.threshold, NORMALISATION_TOLERANCE)
    weights_H = head_weights(streams.head_steps, num_head_P, tail_P)
    if weights_H.min(initial=1.0) < shape.threshold * (1 - 2 * MAX_HEAD_ERROR):
        raise damaged("a head entry lies below the threshold")
    hits = (_starts(num_head_P) + place_P - 1)[place_P > 0]
    base_P = _bases(weights_H, hits, place_P)
    realised_P = realised_logprobs(streams.whole, realised_raw_P, shape, place_P, base_P)

    counts_P = num_head_P + num_draws_P
    head_at, draw_at = _entries(shape)
    codes_E = np.zeros(len(head_at) + len(draw_at), np.int64)
    codes_E[np.delete(head_at, hits)], codes_E[draw_at] = head_codes, draw_codes
    ids_E = _ids(codes_E, counts_P, scored)
    ids_E[head_at[hits]] = scored.realised_P[place_P > 0]
    weights_E = np.full(len(ids_E), shape.threshold, np.float32)
    weights_E[head_at] = weights_H
    return SparseTarget(
        threshold=shape.threshold,
        positions_P=np.concatenate(scored.positions),
        num_head_P=num_head_P.astype(np.int32),
        offsets_P1=np.concatenate([[0], np.cumsum(counts_P)]),
        ids_E=ids_E,
        weights_E=weights_E,
        realised_logprob_P=realised_P.astype(np.float32),
        log_tail_mass_P=log_tail_P.astype(np.float32),
    )


def _cells(streams: _Streams, num_draws_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First codes and raw widths of all cells, those of heads in front of those of draws."""
    draw_cells = within_positions(streams.draw_steps, num_draws_P)
    if draw_cells.max(initial=0) > 255:
        raise damaged("a draw lies in no cell")
    head_resolutions = np.full(len(streams.head_cells), HEAD_RESOLUTION)
    draw_resolutions = np.repeat(resolution_of(num_draws_P), num_draws_P)
    return bases_of(
        np.concatenate([streams.head_cells, draw_cells]),
        np.concatenate([head_resolutions, draw_resolutions]),
    )


def _entries(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Where heads and draws go: behind those of earlier positions, and draws behind the head of their own."""
    num_head_P, num_draws_P = shape.num_head_P, shape.num_draws_P
    head_at = np.repeat(_starts(num_draws_P), num_head_P)
    draw_at = np.repeat(np.cumsum(num_head_P), num_draws_P)
    head_at += np.arange(len(head_at))
    draw_at += np.arange(len(draw_at))
    return head_at, draw_at


def _require_rising(codes_S: np.ndarray, num_draws_P: np.ndarray) -> None:
    rises = codes_S[1:] > codes_S[:-1]
    starts = _starts(num_draws_P)[num_draws_P > 0]
    rises[starts[1:] - 1] = True
    if not rises.all():
        raise damaged("the draws of a position are not in rising order")
