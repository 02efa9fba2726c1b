"""The two bodies of POST /v1/score: Arrow IPC streams, one row a document. Pure: bytes to values and back.

docs/serve.md has the same in full. A stream states its protocol version and its number of documents in the schema
metadata, under the key `vpmoe`, since an Arrow stream cut between two messages reads as a shorter one.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from common.config import AnyConfig, Config, parse_config
from common.errors import ConfigError, FormatError
from common.files import canonical_json
from common.tokenizer import VOCAB_SIZE
from datastore.harmony import Reasoning, RenderConfig
from datastore.target import content_key, target_positions
from datastore.types import SPAN_FINAL, SparseTarget

PROTOCOL_VERSION: Literal[1] = 1
CONTENT_TYPE = "application/vnd.apache.arrow.stream"
REASONING: tuple[Reasoning, ...] = ("low", "medium", "high")

_METADATA_KEY = b"vpmoe"
_REQUEST = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.uint8())),
        ("ranges", pa.list_(pa.int32())),
        ("reasoning", pa.string()),
    ]
)
_PER_POSITION = {
    "positions": np.int32,
    "num_head": np.int32,
    "realised_logprob": np.float32,
    "log_tail_mass": np.float32,
    "entropy": np.float32,
}
_PER_ENTRY = {"ids": np.int32, "weights": np.float32}
_RESPONSE = pa.schema(
    [
        ("content_key", pa.uint64()),
        *((name, pa.list_(pa.from_numpy_dtype(kind))) for name, kind in _PER_POSITION.items()),
        ("offsets", pa.list_(pa.int32())),
        *((name, pa.list_(pa.from_numpy_dtype(kind))) for name, kind in _PER_ENTRY.items()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreDocument:
    """A document to score: its tokens, and either its spans or the positions themselves.

    tokens_T: int32. spans_T: uint8, position t is scored when token t+1 has another span than 0. ranges_R2: int32,
    rising, disjoint [start, stop) of positions t. reasoning: the effort to show the teacher in place of the
    document's own; it needs the render config of the batch.
    """

    tokens_T: np.ndarray
    spans_T: np.ndarray | None = None
    ranges_R2: np.ndarray | None = None
    reasoning: Reasoning | None = None

    def positions(self) -> np.ndarray:
        """The scored positions, int32 [P], ascending. Raises FormatError on a document that cannot be scored."""
        _require_tokens(self.tokens_T)
        if self.spans_T is not None and self.ranges_R2 is None:
            if len(self.spans_T) and (highest := int(self.spans_T.max())) > SPAN_FINAL:
                raise FormatError("span of a token", got=highest, expected="0, 1 or 2")
            return target_positions(self.tokens_T, self.spans_T)
        if self.ranges_R2 is not None and self.spans_T is None:
            return _positions_of_ranges(self.ranges_R2, len(self.tokens_T))
        raise FormatError(
            "what to score of a document",
            got="neither" if self.spans_T is None else "both spans and ranges",
            expected="spans or ranges",
        )

    def content_key(self) -> int:
        """xxh3_64 of the tokens; it seeds the draws and binds the answer to the document."""
        return content_key(self.tokens_T)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreBatch:
    """A decoded request. render: the config that rendered the constant prefix of every document, if stated."""

    documents: list[ScoreDocument]
    render: RenderConfig | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredBatch:
    """A decoded response. teacher_id: who scored (`/identity`). content_keys: one a document, as are targets."""

    teacher_id: str
    content_keys: list[int]
    targets: list[SparseTarget]


class _RequestHeader(Config):
    protocol: Literal[1]
    documents: int
    render: RenderConfig | None


class _ResponseHeader(Config):
    protocol: Literal[1]
    documents: int
    teacher_id: str
    threshold: float


def encode_request(documents: list[ScoreDocument], render: RenderConfig | None = None) -> bytes:
    """The body that asks for `documents`."""
    columns = [
        _lists([d.tokens_T for d in documents], np.int32),
        _lists([d.spans_T for d in documents], np.uint8),
        _lists([None if d.ranges_R2 is None else d.ranges_R2.ravel() for d in documents], np.int32),
        pa.array([d.reasoning for d in documents], pa.string()),
    ]
    header = _RequestHeader(protocol=PROTOCOL_VERSION, documents=len(documents), render=render)
    return _stream(columns, _REQUEST, header)


def decode_request(body: bytes) -> ScoreBatch:
    """The documents of a body, every value checked. Raises FormatError saying what, got and expected."""
    columns, header = _read(body, _REQUEST, _RequestHeader, "a scoring request")
    if not header.documents:
        raise FormatError("a scoring request", got="no documents", expected="at least one")
    tokens, spans, ranges = (_split(columns[name], name) for name in ("tokens", "spans", "ranges"))
    documents = []
    for number, reasoning in enumerate(columns["reasoning"].to_pylist()):
        if reasoning is not None and reasoning not in REASONING:
            raise FormatError(
                f"document {number}: reasoning", got=repr(reasoning), expected="low, medium or high"
            )
        document = ScoreDocument(
            tokens_T=_present(tokens[number], number),
            spans_T=spans[number],
            ranges_R2=_pairs(ranges[number], number),
            reasoning=reasoning,
        )
        try:
            document.positions()
        except FormatError as error:
            raise FormatError(f"document {number}: {error}") from None
        documents.append(document)
    return ScoreBatch(documents=documents, render=header.render)


def encode_response(
    targets: list[SparseTarget], content_keys: list[int], *, teacher_id: str, threshold: float
) -> bytes:
    """The body that answers a request; float32 values travel as they are."""
    arrays: dict[str, list[np.ndarray | None]] = {
        "positions": [t.positions_P for t in targets],
        "num_head": [t.num_head_P for t in targets],
        "realised_logprob": [t.realised_logprob_P for t in targets],
        "log_tail_mass": [t.log_tail_mass_P for t in targets],
        "entropy": [t.entropy_P for t in targets],
        "offsets": [t.offsets_P1 for t in targets],
        "ids": [t.ids_E for t in targets],
        "weights": [t.weights_E for t in targets],
    }
    kinds = {**_PER_POSITION, "offsets": np.int32, **_PER_ENTRY}
    columns = [pa.array(np.array(content_keys, np.uint64))]
    columns += [_lists(arrays[name], kind) for name, kind in kinds.items()]
    header = _ResponseHeader(
        protocol=PROTOCOL_VERSION,
        documents=len(targets),
        teacher_id=teacher_id,
        threshold=threshold,
    )
    return _stream(columns, _RESPONSE, header)


def decode_response(body: bytes) -> ScoredBatch:
    """The targets of a body, as they were before `encode_response`. Raises FormatError when it is damaged."""
    columns, header = _read(body, _RESPONSE, _ResponseHeader, "a scoring response")
    names = [*_PER_POSITION, "offsets", *_PER_ENTRY]
    parts = {name: _split(columns[name], name) for name in names}
    targets = []
    for number in range(header.documents):
        values = {name: _present(parts[name][number], number) for name in names}
        _require_shape(values, number)
        targets.append(
            SparseTarget(
                threshold=header.threshold,
                positions_P=values["positions"],
                num_head_P=values["num_head"],
                offsets_P1=values["offsets"].astype(np.int64),
                ids_E=values["ids"],
                weights_E=values["weights"],
                realised_logprob_P=values["realised_logprob"],
                log_tail_mass_P=values["log_tail_mass"],
                entropy_P=values["entropy"],
            )
        )
    keys = columns["content_key"].to_pylist()
    return ScoredBatch(teacher_id=header.teacher_id, content_keys=keys, targets=targets)


def _require_tokens(tokens_T: np.ndarray) -> None:
    if not len(tokens_T):
        raise FormatError("a document", got="no tokens", expected="at least one")
    lowest, highest = int(tokens_T.min()), int(tokens_T.max())
    if lowest < 0 or highest >= VOCAB_SIZE:
        raise FormatError(
            "token ids of a document",
            got=f"{lowest} to {highest}",
            expected=f"0 to {VOCAB_SIZE - 1}",
        )


def _positions_of_ranges(ranges_R2: np.ndarray, num_tokens: int) -> np.ndarray:
    bounds = np.asarray(ranges_R2, dtype=np.int64)
    rising = np.all(bounds[:, 0] < bounds[:, 1]) and np.all(bounds[1:, 0] >= bounds[:-1, 1])
    inside = bounds.min(initial=0) >= 0 and bounds.max(initial=0) <= num_tokens - 1
    if not (rising and inside):
        raise FormatError(
            "ranges of positions",
            got=bounds[:4].tolist(),
            expected=f"rising, disjoint [start, stop) within 0 to {num_tokens - 1}: "
            "the last position predicts no token of the document",
        )
    parts = [np.arange(start, stop, dtype=np.int32) for start, stop in bounds.tolist()]
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _split(lists: pa.Array, name: str) -> list[np.ndarray | None]:
    """The values of each list of a column, None for a null list. Raises FormatError on a null inside a list."""
    values = lists.flatten()
    if values.null_count:
        raise FormatError(f"column {name}", got="a null among its values", expected="numbers")
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    parts = np.split(values.to_numpy(), np.cumsum(lengths)[:-1])
    present = lists.is_valid().to_pylist()
    return [part if there else None for part, there in zip(parts, present, strict=True)]


def _pairs(values: np.ndarray | None, number: int) -> np.ndarray | None:
    if values is not None and len(values) % 2:
        raise FormatError(
            f"document {number}: ranges",
            got=f"{len(values)} numbers",
            expected="start, stop, start, stop ...",
        )
    return None if values is None else values.reshape(-1, 2)


def _present(values: np.ndarray | None, number: int) -> np.ndarray:
    if values is None:
        raise FormatError(f"document {number}", got="null", expected="a list of values")
    return values


def _require_shape(values: dict[str, np.ndarray], number: int) -> None:
    num_positions, offsets_P1 = len(values["positions"]), values["offsets"]
    counts_P = np.diff(offsets_P1)
    fits = (
        all(len(values[name]) == num_positions for name in _PER_POSITION)
        and len(offsets_P1) == num_positions + 1
        and offsets_P1[0] == 0
        and np.all(counts_P >= values["num_head"])
        and np.all(values["num_head"] >= 0)
        and all(len(values[name]) == offsets_P1[-1] for name in _PER_ENTRY)
    )
    if not fits:
        raise FormatError(
            f"document {number} of a scoring response",
            got="arrays that do not fit each other",
            expected=f"one value for each of {num_positions} positions, entries as offsets say",
        )


def _lists(parts: list[np.ndarray | None], kind: type) -> pa.Array:
    """A list array of one list a part; a null list for None."""
    lengths = [0 if part is None else len(part) for part in parts]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    present = [part for part in parts if part is not None]
    values = np.concatenate([np.empty(0, kind), *present]).astype(kind, copy=False)
    mask = pa.array([part is None for part in parts], pa.bool_())
    return pa.ListArray.from_arrays(offsets, pa.array(values), mask=mask)


def _stream(columns: list[pa.Array], schema: pa.Schema, header: Config) -> bytes:
    stated = schema.with_metadata({_METADATA_KEY: canonical_json(header.resolved())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, stated) as writer:
        writer.write_batch(pa.record_batch(columns, schema=stated))
    return sink.getvalue().to_pybytes()


def _read(
    body: bytes, schema: pa.Schema, header: type[AnyConfig], what: str
) -> tuple[dict[str, pa.Array], AnyConfig]:
    """The columns by name and the header of a stream of this schema."""
    try:
        _require_plain(body, what)
        with pa.ipc.open_stream(body) as reader:
            if not reader.schema.equals(schema):
                raise FormatError(
                    f"columns of {what}", got=_columns(reader.schema), expected=_columns(schema)
                )
            stated = _header(reader.schema, header, what)
            table = reader.read_all()
            table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{what} is no Arrow IPC stream",
            got=f"{len(body)} bytes, {error}",
            expected=f"a whole stream, content type {CONTENT_TYPE}",
        ) from None
    documents: int = stated.documents  # type: ignore[attr-defined]
    if table.num_rows != documents:
        raise FormatError(f"rows of {what}", got=table.num_rows, expected=f"{documents}, as stated")
    return {name: table[name].combine_chunks() for name in schema.names}, stated


def _require_plain(body: bytes, what: str) -> None:
    """FormatError when a batch is compressed: the limit on a body's bytes would not bound what it unpacks to.

    pyarrow does not tell, so the field `compression` of the batch's flatbuffer header is looked up (Arrow's
    format/Message.fbs: Message.header is field 2, RecordBatch.compression field 3); Arrow has verified the buffer.
    """
    for message in pa.ipc.MessageReader.open_stream(body):
        if message.type == "record batch":
            header = message.metadata.to_pybytes()
            batch = _flatbuffer_field(header, struct.unpack_from("<I", header)[0], 2)
            batch += struct.unpack_from("<I", header, batch)[0]
            if _flatbuffer_field(header, batch, 3):
                raise FormatError(what, got="compressed buffers", expected="plain ones")


def _flatbuffer_field(buffer: bytes, table: int, number: int) -> int:
    """Where field `number` of the table at `table` lies in a flatbuffer; 0 when it is absent."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    (size,) = struct.unpack_from("<H", buffer, vtable)
    slot = 4 + 2 * number
    offset = struct.unpack_from("<H", buffer, vtable + slot)[0] if slot < size else 0
    return table + offset if offset else 0


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _header(schema: pa.Schema, header: type[AnyConfig], what: str) -> AnyConfig:
    text = (schema.metadata or {}).get(_METADATA_KEY, b"null")
    try:
        values: Any = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise FormatError(
            f"schema metadata of {what}", got=repr(text[:100]), expected="a JSON object in `vpmoe`"
        )
    try:
        return parse_config(header, values, f"schema metadata of {what}")
    except ConfigError as error:
        raise FormatError(str(error), expected=f"protocol {PROTOCOL_VERSION}") from None
