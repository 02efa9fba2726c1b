"""The blob of a packed row's targets: docs/format.md, section "Sparse target and codec". Pure, vectorised.

Byte planes before zstd (ids split in three, fp16 in two) halve the size of ids against packed bits; head logprobs are
steps below an fp16 first value, at most 1/128 nat off at threshold 1/50.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
import xxhash
import zstandard

from common.errors import AlignmentError, FormatError
from common.tokenizer import VOCAB_SIZE
from datastore.id_order import IdOrder
from datastore.target import (
    NORMALISATION_TOLERANCE,
    concatenate_targets,
    head_mask,
    require_masses,
    require_threshold,
    require_valid,
    target_positions,
)
from datastore.types import DocTarget, PackedRow, SparseTarget, TargetSums

CODEC_VERSION = 1
MAGIC = b"VPT1"
ZSTD_LEVEL = 3
UNSCORED = 0xFFFFFFFF  # in place of the number of positions of a document that was not scored
_PREFIX = struct.Struct("<4sQ")
_COUNTS = struct.Struct("<IIIIId")
_FP16_ERROR = 2.0**-9  # of a logprob between -8 and 0; a smaller mass does not move a sum


def steps_per_nat(threshold: float) -> int:
    """Resolution of head logprobs: the finer of 64 and 32 whose 255 steps reach ln(threshold).

    64 down to 1/52 (error <= 1/128 nat), 32 down to 1/254 (error <= 1/64 nat).
    """
    require_threshold(threshold)
    return 64 if -math.log(threshold) * 64 <= 254 else 32


def stored_tolerance(threshold: float) -> float:
    """How far stored masses may be from their sum 1: a reduction's own error, half a step, and fp16's."""
    return NORMALISATION_TOLERANCE + 0.5 / steps_per_nat(threshold) + _FP16_ERROR


@dataclass(frozen=True, slots=True)
class _Header:
    documents: int
    positions: int
    heads: int
    draws: int
    steps: int
    threshold: float

    def payload_bytes(self, firsts: int) -> int:
        """Size of the payload, of which `firsts` positions have a head."""
        return (
            36 * self.documents
            + 6 * self.positions
            + 3 * (self.heads + self.draws)
            + (2 * firsts + self.heads - firsts)
        )


def encode_blob(documents: list[DocTarget | None], row: PackedRow, order: IdOrder) -> bytes:
    """The blob of the documents of `row`, in row order (at least one, all of one threshold; None: not scored).

    Every target must be a valid reduction: heads by falling probability, draws by ascending id, each of weight
    threshold (float32), no id twice, head + tail mass 1, draws within one of tail/threshold, logprobs <= 0,
    realised logprobs above -65504. Masses are held to `stored_tolerance`, so that decoded targets encode again (to
    the same bytes); `row_budget` holds fresh reductions to 1e-3.
    Raises FormatError on anything else: what cannot be read back is never written; AlignmentError when the documents
    or their positions are not those of the row.
    """
    positions = _row_positions(row)
    if len(documents) != len(positions):
        raise AlignmentError(
            "targets of a row", got=f"{len(documents)} documents", expected=f"{len(positions)}"
        )
    scored = [document for document in documents if document is not None]
    if not scored:
        raise FormatError("targets of a row", got="no document", expected="at least one")
    for document, positions_P in zip(documents, positions, strict=True):
        if document and not np.array_equal(document.target.positions_P, positions_P):
            raise AlignmentError(
                "targets of a document stand at other positions than those of the row",
                got=f"{len(document.target.positions_P)} positions",
                expected=f"{len(positions_P)}, those whose next token is a target",
            )
    targets = [document.target for document in scored]
    in_head_E = np.concatenate(
        [require_valid(target, stored_tolerance(target.threshold)) for target in targets]
    )
    joined = concatenate_targets(targets, [target.positions_P for target in targets])
    num_draws_P = np.diff(joined.offsets_P1) - joined.num_head_P
    header = _Header(
        len(documents),
        len(joined.positions_P),
        int(in_head_E.sum()),
        int((~in_head_E).sum()),
        steps_per_nat(joined.threshold),
        joined.threshold,
    )
    first, below = _quantise_head(joined, in_head_E, header.steps)
    sums = np.array([_sums_of(document) for document in documents], dtype="<f8")
    if not np.all(np.isfinite(sums) & (sums >= 0)):
        raise FormatError("entropy sums of a document", got=sums.tolist(), expected="finite, >= 0")
    payload = b"".join(
        [
            np.array([d.content_key if d else 0 for d in documents], dtype="<u8").tobytes(),
            np.array(
                [len(d.target.positions_P) if d else UNSCORED for d in documents], dtype="<u4"
            ).tobytes(),
            sums.tobytes(),
            joined.num_head_P.astype(np.uint8).tobytes(),
            num_draws_P.astype(np.uint8).tobytes(),
            _planes(joined.ids_E[in_head_E].astype("<u4"), 3),
            _planes(first, 2),
            below.tobytes(),
            _planes(joined.ids_E[~in_head_E].astype("<u4"), 3),
            _planes(_half(joined.realised_logprob_P), 2),
            _planes(_half(joined.log_tail_mass_P), 2),
        ]
    )
    compressor = zstandard.ZstdCompressor(
        level=ZSTD_LEVEL, write_checksum=True, write_content_size=True
    )
    counts = (header.documents, header.positions, header.heads, header.draws, header.steps)
    body = _COUNTS.pack(*counts, header.threshold) + compressor.compress(payload)
    return _PREFIX.pack(MAGIC, xxhash.xxh3_64_intdigest(body)) + body


def _row_positions(row: PackedRow) -> list[np.ndarray]:
    """For each document of a row, the positions that carry an entry, counted from its first token (int32 [P])."""
    return [target_positions(row.tokens_T[doc], row.spans_T[doc]) for doc in row.documents()]


def _sums_of(document: DocTarget | None) -> tuple[float, float, float]:
    if document is None:
        return 0.0, 0.0, 0.0
    sums = document.entropy_sums
    return sums.reasoning, sums.final, sums.control


def _half(values: np.ndarray) -> np.ndarray:
    """Values <= 0 as fp16, little-endian; a negative zero becomes plain zero."""
    with np.errstate(over="ignore"):  # a log tail mass below -65504 is -inf: e^-65504 is zero
        return values.astype("<f2") + np.float16(0.0)


def _planes(values: np.ndarray, num_planes: int) -> bytes:
    """The lowest `num_planes` bytes of little-endian values, one plane after another."""
    bytes_NB = values.view(np.uint8).reshape(len(values), values.itemsize)
    return bytes_NB.T[:num_planes].tobytes()


def _quantise_head(
    target: SparseTarget, in_head_E: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """First head logprob of each position with a head (fp16), and the others' steps below it (uint8)."""
    logprobs_H = np.log(target.weights_E[in_head_E].astype(np.float64))
    num_head_P = target.num_head_P[target.num_head_P > 0]
    is_first_H = _is_first(num_head_P)
    first = _half(logprobs_H[is_first_H])
    below_H = np.rint((np.repeat(first.astype(np.float64), num_head_P) - logprobs_H) * steps)
    return first, np.maximum(below_H[~is_first_H], 0).astype(np.uint8)


def _is_first(counts: np.ndarray) -> np.ndarray:
    """Marks the first of each run of `counts` (all > 0): bool [sum of counts]."""
    marks = np.zeros(int(counts.sum()), dtype=bool)
    marks[np.cumsum(counts) - counts] = True
    return marks


def decode_blob(blob: bytes, row: PackedRow, order: IdOrder) -> list[DocTarget | None]:
    """The targets of each document of `row`, None where it was not scored.

    Positions are not stored, so the row gives them; they also bound the size before anything is decompressed.
    Content keys are not compared here: `row_target` does that.
    Raises FormatError on any damage or malformed field, AlignmentError when the counts are not those of the row.
    """
    header, frame = _open(blob)
    positions = _row_positions(row)
    num_positions = sum(len(positions_P) for positions_P in positions)
    if header.documents != len(positions) or header.positions > num_positions:
        raise AlignmentError(
            "targets do not belong to this row",
            got=f"{header.documents} documents with {header.positions} targets",
            expected=f"{len(positions)} documents with {num_positions}",
            remedy="score this dataset again",
        )
    fields = _Fields(_decompress(frame, header))
    keys_D = fields.take("<u8", header.documents)
    counts_D = fields.take("<u4", header.documents).tolist()
    sums_D3 = fields.take("<f8", 3 * header.documents).reshape(-1, 3)
    scored = [p for p, count in zip(positions, counts_D, strict=True) if count != UNSCORED]
    held = [count for count in counts_D if count != UNSCORED]
    if held != [len(p) for p in scored] or header.positions != sum(held) or not held:
        raise AlignmentError(
            "targets do not belong to the documents of this row",
            got=f"{counts_D} targets a document",
            expected=f"{[len(positions_P) for positions_P in positions]}",
            remedy="score this dataset again",
        )
    target = _decode_target(fields, header, np.concatenate(scored).astype(np.int32))
    if not np.all(np.isfinite(sums_D3) & (sums_D3 >= 0)):
        raise _damaged("an entropy sum is negative or not finite")
    ends = np.cumsum([0 if count == UNSCORED else count for count in counts_D]).tolist()
    return [
        DocTarget(
            content_key=key,
            target=_slice(target, end - count, end),
            entropy_sums=TargetSums(reasoning=sums[0], final=sums[1], control=sums[2]),
        )
        if count != UNSCORED
        else None
        for key, sums, count, end in zip(
            keys_D.tolist(), sums_D3.tolist(), counts_D, ends, strict=True
        )
    ]


def _damaged(what: str) -> FormatError:
    return FormatError(f"target blob: {what}", remedy="score this shard again")


def _open(blob: bytes) -> tuple[_Header, memoryview]:
    """Check the hash and the counts in front of the frame."""
    if len(blob) < _PREFIX.size + _COUNTS.size:
        raise _damaged(f"it has {len(blob)} bytes, fewer than its header")
    magic, stored_hash = _PREFIX.unpack_from(blob)
    if magic != MAGIC:
        raise FormatError("target blob of another format", got=magic, expected=MAGIC)
    body = memoryview(blob)[_PREFIX.size :]
    if xxhash.xxh3_64_intdigest(body) != stored_hash:
        raise _damaged("its hash does not match its bytes")
    documents, positions, heads, draws, steps, threshold = _COUNTS.unpack_from(body)
    header = _Header(documents, positions, heads, draws, steps, threshold)
    if steps != steps_per_nat(threshold):
        raise _damaged(f"{steps} steps per nat are wrong at threshold {threshold}")
    if max(heads, draws) > positions * 255:
        raise _damaged(f"{heads} head entries and {draws} draws at {positions} positions")
    return header, body[_COUNTS.size :]


def _decompress(frame: memoryview, header: _Header) -> bytes:
    """The payload; its size is checked against the counts before a byte is decompressed."""
    smallest, largest = sorted(
        header.payload_bytes(firsts) for firsts in (0, min(header.heads, header.positions))
    )
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if not parameters.has_checksum or not smallest <= parameters.content_size <= largest:
            raise _damaged(f"its frame announces {parameters.content_size} bytes")
        return zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=largest, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise _damaged(f"zstd: {error}") from None


class _Fields:
    """Takes one array after another from the payload; FormatError where it ends too early."""

    def __init__(self, payload: bytes) -> None:
        self.payload, self.at = payload, 0

    def take(self, dtype: str, count: int) -> np.ndarray:
        end = self.at + np.dtype(dtype).itemsize * count
        if end > len(self.payload):
            raise _damaged("its payload is shorter than its counts")
        values = np.frombuffer(self.payload, dtype, count, self.at)
        self.at = end
        return values

    def ids(self, count: int) -> np.ndarray:
        low, middle, high = self.take("u1", 3 * count).reshape(3, count)
        ids = high.astype(np.int32)
        for plane in (middle, low):
            ids <<= 8
            ids |= plane
        if count and ids.max() >= VOCAB_SIZE:
            raise _damaged(f"id {ids.max()} is outside the vocabulary")
        return ids

    def halves(self, count: int) -> np.ndarray:
        """Float32 values <= 0 from two planes of fp16."""
        planes = self.take("u1", 2 * count).reshape(2, count)
        values = np.ascontiguousarray(planes.T).view("<f2").reshape(count).astype(np.float32)
        if not np.all(values <= 0):
            raise _damaged("a logprob is above 0 or not a number")
        return values

    def finish(self) -> None:
        if self.at != len(self.payload):
            raise _damaged("its payload is longer than its counts")


def _decode_target(fields: _Fields, header: _Header, positions_P: np.ndarray) -> SparseTarget:
    num_head_P = fields.take("u1", header.positions).astype(np.int32)
    num_draws_P = fields.take("u1", header.positions).astype(np.int32)
    if (int(num_head_P.sum()), int(num_draws_P.sum())) != (header.heads, header.draws):
        raise _damaged("entries of its positions do not add up")
    head_ids = fields.ids(header.heads)
    head_weights, head_mass_P = _decode_head(fields, header, num_head_P)
    draw_ids = fields.ids(header.draws)
    realised_P = fields.halves(header.positions)
    log_tail_P = fields.halves(header.positions)
    fields.finish()
    if not np.all(np.isfinite(realised_P)):
        raise _damaged("a realised logprob is not finite")
    _require_ascending(draw_ids, num_draws_P[num_draws_P > 0])
    tolerance = 2 * stored_tolerance(header.threshold)  # of what was encoded, and of encoding it
    require_masses(head_mass_P, log_tail_P, num_draws_P, header.threshold, tolerance)
    in_head_E = head_mask(num_head_P, num_draws_P)
    in_draws_E = ~in_head_E
    ids_E = np.empty(len(in_head_E), np.int32)
    ids_E[in_head_E], ids_E[in_draws_E] = head_ids, draw_ids
    weights_E = np.full(len(in_head_E), header.threshold, np.float32)
    weights_E[in_head_E] = head_weights
    offsets_P1 = np.zeros(header.positions + 1, np.int64)
    np.cumsum(num_head_P + num_draws_P, out=offsets_P1[1:])
    return SparseTarget(
        threshold=header.threshold,
        positions_P=positions_P,
        num_head_P=num_head_P,
        offsets_P1=offsets_P1,
        ids_E=ids_E,
        weights_E=weights_E,
        realised_logprob_P=realised_P,
        log_tail_mass_P=log_tail_P,
    )


def _decode_head(
    fields: _Fields, header: _Header, num_head_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the head entries (float32 [H]) and their sum a position (float64 [P])."""
    has_head_P = num_head_P > 0
    counts = num_head_P[has_head_P]
    first = fields.halves(len(counts))
    below_H = np.zeros(header.heads, np.uint8)
    is_first_H = _is_first(counts)
    below_H[~is_first_H] = fields.take("u1", header.heads - len(counts))
    if not np.all((below_H[1:] >= below_H[:-1]) | is_first_H[1:]):
        raise _damaged("a head is not sorted by falling probability")
    falloff = np.exp(-np.arange(256) / header.steps).astype(np.float32)
    weights_H = falloff[below_H]
    weights_H *= np.repeat(np.exp(first), counts)
    mass_P = np.zeros(header.positions)
    if len(counts):
        if weights_H.min() < header.threshold * (1 - 2 * stored_tolerance(header.threshold)):
            raise _damaged("a head entry lies below the threshold")
        starts = np.cumsum(counts) - counts
        mass_P[has_head_P] = np.add.reduceat(weights_H, starts, dtype=np.float64)
    return weights_H, mass_P


def _require_ascending(draw_ids: np.ndarray, counts: np.ndarray) -> None:
    if not np.all((draw_ids[1:] > draw_ids[:-1]) | _is_first(counts)[1:]):
        raise _damaged("the draws of a position are not in ascending order")


def _slice(target: SparseTarget, start: int, end: int) -> SparseTarget:
    """Positions start..end of a target, as views."""
    first, last = int(target.offsets_P1[start]), int(target.offsets_P1[end])
    return SparseTarget(
        threshold=target.threshold,
        positions_P=target.positions_P[start:end],
        num_head_P=target.num_head_P[start:end],
        offsets_P1=target.offsets_P1[start : end + 1] - first,
        ids_E=target.ids_E[first:last],
        weights_E=target.weights_E[first:last],
        realised_logprob_P=target.realised_logprob_P[start:end],
        log_tail_mass_P=target.log_tail_mass_P[start:end],
    )
