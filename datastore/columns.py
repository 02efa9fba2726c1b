"""How packed rows lie in the columns of an Arrow record batch, and how they are seen there again without a copy.

Pure: record batches in, views out. docs/format.md has the columns as a table; datastore/shard.py hashes and checks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from datastore.container import as_numpy
from datastore.types import PackedRow

DOC_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class TextViews:
    """The texts of all documents of a batch: text n is content[offsets[n]:offsets[n + 1]] in UTF-8."""

    offsets: memoryview
    content: memoryview

    def of(self, documents: slice) -> tuple[str, ...]:
        """The texts of these documents. Raises UnicodeDecodeError; slices clamp, so none reaches outside the map."""
        ends = self.offsets[documents.start : documents.stop + 1].tolist()
        # From a list: a generator costs 0.15 us more, in a read of 15 us.
        return tuple(
            [str(self.content[start:end], "utf-8") for start, end in itertools.pairwise(ends)]
        )


@dataclass(frozen=True, slots=True)
class TokenViews:
    """The columns of a batch of R rows; doc_offsets [R+1] counts documents before each row."""

    tokens_RT: np.ndarray
    spans_RT: np.ndarray
    doc_offsets: np.ndarray
    doc_ends: np.ndarray
    doc_ids: memoryview
    languages: TextViews
    exercises: TextViews
    hashes: np.ndarray

    def row(self, i: int) -> PackedRow:
        """Row `i` of the batch, nothing in it checked. Raises UnicodeDecodeError."""
        documents = slice(int(self.doc_offsets[i]), int(self.doc_offsets[i + 1]))
        ids = bytes(self.doc_ids[documents.start * DOC_ID_BYTES : documents.stop * DOC_ID_BYTES])
        return PackedRow(
            tokens_T=self.tokens_RT[i],
            spans_T=self.spans_RT[i],
            doc_ends_D=self.doc_ends[documents],
            doc_ids=tuple(
                [ids[start : start + DOC_ID_BYTES] for start in range(0, len(ids), DOC_ID_BYTES)]
            ),
            languages=self.languages.of(documents),
            exercises=self.exercises.of(documents),
            row_hash=int(self.hashes[i]),
        )


def token_fields(seq_len: int) -> list[pa.Field]:
    """The columns of a token shard, none of them nullable."""

    def item(type_: pa.DataType) -> pa.Field:
        return pa.field("item", type_, nullable=False)

    columns = {
        "tokens": pa.list_(item(pa.int32()), seq_len),
        "spans": pa.list_(item(pa.uint8()), seq_len),
        "doc_ends": pa.list_(item(pa.int32())),
        "doc_ids": pa.list_(item(pa.binary(DOC_ID_BYTES))),
        "languages": pa.list_(item(pa.utf8())),
        "exercises": pa.list_(item(pa.utf8())),
        "row_hash": pa.uint64(),
    }
    return [pa.field(name, type_, nullable=False) for name, type_ in columns.items()]


def token_batch(
    rows: Sequence[PackedRow], hashes: Sequence[int], schema: pa.Schema
) -> pa.RecordBatch:
    """The record batch of checked rows and their hashes."""
    types = dict(zip(schema.names, schema.types, strict=True))
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row.doc_ids) for row in rows], out=offsets[1:])
    doc_ids = pa.py_buffer(b"".join(itertools.chain.from_iterable(row.doc_ids for row in rows)))
    by_document = {
        "doc_ends": pa.array(np.concatenate([row.doc_ends_D for row in rows])),
        "doc_ids": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(DOC_ID_BYTES), int(offsets[-1]), [None, doc_ids]
        ),
        "languages": pa.array([text for row in rows for text in row.languages], pa.utf8()),
        "exercises": pa.array([text for row in rows for text in row.exercises], pa.utf8()),
    }
    by_position = {
        "tokens": pa.array(np.concatenate([row.tokens_T for row in rows])),
        "spans": pa.array(np.concatenate([row.spans_T for row in rows])),
    }
    columns = {
        name: pa.FixedSizeListArray.from_arrays(values, type=types[name])
        for name, values in by_position.items()
    }
    columns |= {
        name: pa.ListArray.from_arrays(pa.array(offsets), values, type=types[name])
        for name, values in by_document.items()
    }
    columns["row_hash"] = pa.array(np.array(hashes, np.uint64))
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def token_views(batch: pa.RecordBatch, seq_len: int) -> TokenViews:
    """Views of a batch that Arrow has validated. Raises ValueError for what `token_batch` never makes."""
    tokens, spans, doc_ends, *by_document, hashes = batch.columns
    require_no_nulls(batch)
    if not all(column.offsets.equals(doc_ends.offsets) for column in by_document):
        raise ValueError("the columns of a row count other documents")
    doc_ids, languages, exercises = by_document
    return TokenViews(
        tokens_RT=as_numpy(tokens.flatten()).reshape(len(batch), seq_len),
        spans_RT=as_numpy(spans.flatten()).reshape(len(batch), seq_len),
        doc_offsets=as_numpy(doc_ends.offsets),
        doc_ends=as_numpy(doc_ends.values),
        doc_ids=fixed_bytes(doc_ids.values),
        languages=text_views(languages.values),
        exercises=text_views(exercises.values),
        hashes=as_numpy(hashes),
    )


def require_no_nulls(batch: pa.RecordBatch) -> None:
    """ValueError when a column or the values of its lists hold a null."""
    if any(array.null_count for column in batch.columns for array in _with_children(column)):
        raise ValueError("null values in a column that has none")


def _with_children(column: pa.Array) -> tuple[pa.Array, ...]:
    return (column, column.values) if pa.types.is_nested(column.type) else (column,)


def fixed_bytes(array: pa.FixedSizeBinaryArray) -> memoryview:
    """The bytes of ids of DOC_ID_BYTES each, end to end."""
    content = array.buffers()[1]
    return memoryview(content)[array.offset * DOC_ID_BYTES :] if content else memoryview(b"")


def text_views(array: pa.StringArray) -> TextViews:
    """The texts of a column that Arrow has validated."""
    _, offsets, content = array.buffers()
    return TextViews(
        offsets=np.frombuffer(offsets, np.int32, len(array) + 1, array.offset * 4).data,
        content=memoryview(content) if content is not None else memoryview(b""),
    )
