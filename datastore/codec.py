"""The blob of a packed row's targets: docs/format.md, section "Sparse target and codec". Pure, vectorised.

A header, one zstd frame with a block for each stream (so each has a Huffman table of its own), and behind it raw bits
that no compressor could shorten. The row gives what a blob need not repeat: positions, realised ids, uniform numbers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash
import zstandard

from common.errors import AlignmentError, FormatError
from datastore.codec_ids import damaged
from datastore.codec_masses import MAX_HEAD_ERROR, Shape
from datastore.codec_target import Fields, Scored, decode_target, encode_target
from datastore.id_order import IdOrder
from datastore.target import concatenate_targets, require_threshold, require_valid
from datastore.types import DocTarget, PackedRow, SparseTarget, TargetSums

CODEC_VERSION = 2
MAGIC = b"VPT2"
# Symbols here repeat by chance only: the shortest search for the longest matches leaves them to the Huffman tables
# (level 3 searches more and gives 3 % more bytes, level 19 3 % as well; measured on the targets of a language model).
_ZSTD = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=20,
    hash_log=6,
    min_match=7,
    write_checksum=True,
    write_content_size=True,
)
_PREFIX = struct.Struct("<4sQ")
_COUNTS = struct.Struct("<IIIIId")
_DOCUMENT_BYTES = 33


@dataclass(frozen=True, slots=True)
class _Header:
    documents: int
    positions: int
    heads: int
    draws: int
    frame_bytes: int
    threshold: float

    @property
    def most_payload_bytes(self) -> int:
        """Size that no payload of these counts exceeds."""
        streams = 5 * self.positions + 2 * self.heads + self.draws
        return _DOCUMENT_BYTES * self.documents + streams


def encode_blob(documents: list[DocTarget | None], row: PackedRow, order: IdOrder) -> bytes:
    """The blob of the documents of `row`, in row order (at least one, all of one threshold; None: not scored).

    Every target must be a valid reduction: heads by falling probability, draws by ascending id, each of weight
    threshold (float32), no id twice, head + tail mass 1, as many draws as the document's uniform numbers give,
    logprobs <= 0, a realised token in the head with that head entry's logprob. Decoded targets encode again, to the
    same bytes. Raises FormatError on anything else: what cannot be read back is never written; AlignmentError when
    the documents or their positions are not those of the row.
    """
    if len(documents) != len(row.doc_ends_D):
        raise AlignmentError(
            "targets of a row",
            got=f"{len(documents)} documents",
            expected=f"{len(row.doc_ends_D)}",
        )
    held = {number: document for number, document in enumerate(documents) if document is not None}
    if not held:
        raise FormatError("targets of a row", got="no document", expected="at least one")
    scored = Scored.of(row, list(held), order)
    for document, positions_P in zip(held.values(), scored.positions, strict=True):
        _require_positions(document.target.positions_P, positions_P)
    targets = [document.target for document in held.values()]
    in_head_E = np.concatenate([require_valid(target, MAX_HEAD_ERROR) for target in targets])
    joined = concatenate_targets(targets, scored.positions)
    shape = Shape.of(
        joined.num_head_P,
        np.diff(joined.offsets_P1) - joined.num_head_P,
        scored.uniforms_P([document.content_key for document in held.values()]),
        joined.threshold,
    )
    streams, raw = encode_target(joined, in_head_E, scored, shape)
    frame = compress_streams([_document_fields(documents), *streams])
    header = _COUNTS.pack(
        len(documents),
        len(shape.num_head_P),
        int(shape.num_head_P.sum()),
        int(shape.num_draws_P.sum()),
        len(frame),
        shape.threshold,
    )
    body = header + frame + raw
    return _PREFIX.pack(MAGIC, xxhash.xxh3_64_intdigest(body)) + body


def _require_positions(found_P: np.ndarray, expected_P: np.ndarray) -> None:
    if not np.array_equal(found_P, expected_P):
        raise AlignmentError(
            "targets of a document stand at other positions than those of the row",
            got=f"{len(found_P)} positions",
            expected=f"{len(expected_P)}, those whose next token is a target",
        )


def _document_fields(documents: list[DocTarget | None]) -> bytes:
    held = [document for document in documents if document is not None]
    sums = [d.entropy_sums for d in held]
    sums_D3 = np.array([(s.reasoning, s.final, s.control) for s in sums], dtype="<f8")
    if not np.all(np.isfinite(sums_D3) & (sums_D3 >= 0)):
        raise FormatError(
            "entropy sums of a document", got=sums_D3.tolist(), expected="finite, >= 0"
        )
    is_scored = bytes(document is not None for document in documents)
    keys_D = np.array([document.content_key for document in held], dtype="<u8")
    return is_scored + keys_D.tobytes() + sums_D3.tobytes()


def compress_streams(streams: list[bytes]) -> bytes:
    """One zstd frame, a block (or more) for each stream: each gets the Huffman table of its own symbols."""
    compressor = zstandard.ZstdCompressor(compression_params=_ZSTD).compressobj(
        size=sum(map(len, streams))
    )
    parts = []
    for stream in streams:
        parts.append(compressor.compress(stream))
        parts.append(compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join([*parts, compressor.flush()])


def decode_blob(blob: bytes, row: PackedRow, order: IdOrder) -> list[DocTarget | None]:
    """The targets of each document of `row`, None where it was not scored. Draws come in the codec's order.

    What the row gives bounds the size before anything is decompressed. Content keys are not compared here:
    `row_target` does that. Raises FormatError on any damage or malformed field, AlignmentError when the counts are
    not those of the row.
    """
    header, body = _open(blob)
    if header.documents != len(row.doc_ends_D) or header.positions > len(row.tokens_T):
        raise _misaligned(header, row)
    fields = Fields(_decompress(body[: header.frame_bytes], header))
    scored = _scored_documents(fields, header, row, order)
    keys = fields.take("<u8", len(scored.numbers)).tolist()
    sums_D3 = fields.take("<f8", 3 * len(scored.numbers)).reshape(-1, 3)
    if not np.all(np.isfinite(sums_D3) & (sums_D3 >= 0)):
        raise damaged("an entropy sum is negative or not finite")
    num_head_P, num_draws_P = fields.stream(header.positions), fields.stream(header.positions)
    if (int(num_head_P.sum()), int(num_draws_P.sum())) != (header.heads, header.draws):
        raise damaged("entries of its positions do not add up")
    shape = Shape.of(num_head_P, num_draws_P, scored.uniforms_P(keys), header.threshold)
    target = decode_target(fields, body[header.frame_bytes :], scored, shape)
    documents: list[DocTarget | None] = [None] * header.documents
    spans = scored.spans(np.ones(header.positions, np.int64))
    for number, key, sums, span in zip(scored.numbers, keys, sums_D3.tolist(), spans, strict=True):
        documents[number] = DocTarget(
            content_key=key,
            target=_slice(target, span.start, span.stop),
            entropy_sums=TargetSums(reasoning=sums[0], final=sums[1], control=sums[2]),
        )
    return documents


def _scored_documents(fields: Fields, header: _Header, row: PackedRow, order: IdOrder) -> Scored:
    is_scored_D = fields.take("u1", header.documents)
    if is_scored_D.max() > 1 or not is_scored_D.any():
        raise damaged("no document is scored, or one is neither scored nor not")
    scored = Scored.of(row, np.flatnonzero(is_scored_D).tolist(), order)
    if header.positions != len(scored.realised_P):
        raise _misaligned(header, row)
    return scored


def _misaligned(header: _Header, row: PackedRow) -> AlignmentError:
    return AlignmentError(
        "targets do not belong to this row",
        got=f"{header.documents} documents with {header.positions} targets",
        expected=f"{len(row.doc_ends_D)} documents with the targets of those that are scored",
        remedy="score this dataset again",
    )


def _open(blob: bytes) -> tuple[_Header, memoryview]:
    """Check the hash and the counts in front of the frame."""
    if len(blob) < _PREFIX.size + _COUNTS.size:
        raise damaged(f"it has {len(blob)} bytes, fewer than its header")
    magic, stored_hash = _PREFIX.unpack_from(blob)
    if magic != MAGIC:
        raise FormatError("target blob of another format", got=magic, expected=MAGIC)
    body = memoryview(blob)[_PREFIX.size :]
    if xxhash.xxh3_64_intdigest(body) != stored_hash:
        raise damaged("its hash does not match its bytes")
    header = _Header(*_COUNTS.unpack_from(body))
    require_threshold(header.threshold)
    if max(header.heads, header.draws) > header.positions * 255:
        raise damaged(
            f"{header.heads} head entries and {header.draws} draws at {header.positions} positions"
        )
    return header, body[_COUNTS.size :]


def _decompress(frame: memoryview, header: _Header) -> bytes:
    """The payload; its size is checked against the counts before a byte is decompressed."""
    if len(frame) != header.frame_bytes:
        raise damaged(f"its frame has {len(frame)} bytes, not {header.frame_bytes}")
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if not parameters.has_checksum or parameters.content_size > header.most_payload_bytes:
            raise damaged(f"its frame announces {parameters.content_size} bytes")
        return zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=header.most_payload_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise damaged(f"zstd: {error}") from None


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
