"""Shards: Arrow IPC files of packed rows and of teacher blobs (docs/format.md, "Files").

A row read is a zero-copy view into a memory map whose hash was checked on that very read. A damaged, truncated,
exchanged or foreign file is a FormatError that names the file, the row and the remedy, never a wrong number.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from common.errors import AlignmentError, FormatError
from common.tokenizer import VOCAB_SIZE
from datastore.columns import DOC_ID_BYTES, TokenViews, token_batch, token_fields, token_views
from datastore.container import BATCH_ROWS, FileEntry, MappedShard, as_numpy, write_container
from datastore.types import SPLITS, PackedRow, Split

__all__ = [
    "FileEntry",
    "TargetShard",
    "TokenShard",
    "check_row",
    "hash_blob",
    "hash_row",
    "shard_name",
    "write_target_shard",
    "write_token_shard",
]

FORMAT_VERSION = 2
Item = TypeVar("Item")
_REMEDY = (
    "restore the file or build the dataset again; `vpmoe-data verify` lists every damaged file"
)
_TARGET_REMEDY = (
    "restore the file or run `vpmoe-data score` again; `vpmoe-data verify` lists every damaged file"
)
# dataset_id or target_id, split, shard, row: what binds a row to its one place in the one store it belongs to.
_PLACE = struct.Struct("<32sBII")
_LENGTH = struct.Struct("<I")


def shard_name(split: Split, shard: int) -> str:
    """The one name of a shard, relative to its dataset or target folder."""
    return f"{split}/shard-{shard:05d}.arrow"


def hash_row(row: PackedRow, *, dataset_id: str, split: Split, shard: int, index: int) -> int:
    """xxh3_64 of a packed row and of its place: row `index` of shard `shard` (`row.row_hash` is not read)."""
    digest = xxhash.xxh3_64(place_bytes(dataset_id, split, shard, index))
    digest.update(struct.pack("<I", len(row.doc_ids)))
    digest.update(row.tokens_T)
    digest.update(row.spans_T)
    digest.update(row.doc_ends_D)
    digest.update(b"".join(row.doc_ids))
    for label in (*row.languages, *row.exercises):
        encoded = label.encode()
        digest.update(_LENGTH.pack(len(encoded)))
        digest.update(encoded)
    return digest.intdigest()


def hash_blob(
    blob: bytes | None, row_hash: int, *, target_id: str, split: Split, shard: int, index: int
) -> int:
    """xxh3_64 of a blob (nothing when None), of the token row that it scores and of its place."""
    digest = xxhash.xxh3_64(place_bytes(target_id, split, shard, index))
    digest.update(struct.pack("<Q", row_hash))
    digest.update(blob or b"")
    return digest.intdigest()


def write_token_shard(
    folder: Path,
    rows: Iterable[PackedRow],
    *,
    dataset_id: str,
    split: Split,
    shard: int,
    seq_len: int,
) -> FileEntry:
    """Stream `rows` into folder/<shard_name>, durable and complete or not there at all.

    Row hashes are computed here; `row.row_hash` of the input is ignored. Holds 64 rows at a time.
    Raises FormatError for a row that a reader would refuse.
    """
    name = shard_name(split, shard)
    schema = _token_schema(dataset_id, split, shard, seq_len)

    def batches() -> Iterator[pa.RecordBatch]:
        for first, group in grouped(rows):
            for offset, row in enumerate(group):
                check_row(row, seq_len, f"{name}: row {first + offset} cannot be written")
            hashes = [
                hash_row(row, dataset_id=dataset_id, split=split, shard=shard, index=first + i)
                for i, row in enumerate(group)
            ]
            yield token_batch(group, hashes, schema)

    return write_container(Path(folder), name, schema, batches())


def write_target_shard(
    folder: Path,
    blobs: Iterable[tuple[int, bytes | None]],
    *,
    target_id: str,
    split: Split,
    shard: int,
) -> FileEntry:
    """Stream (row_hash of the token row, blob or None where it was not scored) into folder/<shard_name>.

    Durable and complete or not there at all. Raises FormatError for an empty blob, which None stands for.
    """
    name = shard_name(split, shard)
    schema = _target_schema(target_id, split, shard)

    def batches() -> Iterator[pa.RecordBatch]:
        for first, group in grouped(blobs):
            for offset, (_, blob) in enumerate(group):
                if blob is not None and not blob:
                    raise FormatError(
                        f"{name}: row {first + offset} cannot be written: its blob is empty",
                        expected="bytes, or None for a row without targets",
                    )
            hashes = [
                hash_blob(
                    blob, row_hash, target_id=target_id, split=split, shard=shard, index=first + i
                )
                for i, (row_hash, blob) in enumerate(group)
            ]
            columns = [
                pa.array([blob for _, blob in group], pa.large_binary()),
                pa.array(np.array([row_hash for row_hash, _ in group], np.uint64)),
                pa.array(np.array(hashes, np.uint64)),
            ]
            yield pa.record_batch(columns, schema=schema)

    return write_container(Path(folder), name, schema, batches())


def check_row(row: PackedRow, seq_len: int, where: str) -> None:
    """Raise FormatError, its message led by `where`, unless the row's arrays have the shapes of docs/format.md.

    Cheap structure only (a few microseconds), on every write and read; the grammar of spans is `verify`'s.
    """
    ends_D = row.doc_ends_D
    faults = (
        (row.tokens_T.shape != (seq_len,) or row.tokens_T.dtype != np.int32, "tokens"),
        (row.spans_T.shape != (seq_len,) or row.spans_T.dtype != np.uint8, "spans"),
        (ends_D.ndim != 1 or ends_D.dtype != np.int32, "doc_ends"),
    )
    for wrong, name in faults:
        if wrong:
            raise FormatError(
                f"{where}: {name} has the wrong shape or dtype",
                expected=f"int32 tokens, uint8 spans of length {seq_len}, int32 doc_ends",
            )
    ends = ends_D.tolist()  # a few numbers: numpy's own comparisons cost 1.7 us more
    if not ends or ends[-1] > seq_len or any(b <= a for a, b in itertools.pairwise([0, *ends])):
        raise FormatError(
            f"{where}: doc_ends are not strictly ascending in 1..{seq_len}",
            got=ends[:8],
            remedy=_REMEDY,
        )
    if len(row.doc_ids) != len(ends) or any(len(d) != DOC_ID_BYTES for d in row.doc_ids):
        raise FormatError(
            f"{where}: doc_ids do not match doc_ends",
            got=f"{len(row.doc_ids)} ids",
            expected=f"{len(ends)} ids of {DOC_ID_BYTES} bytes",
            remedy=_REMEDY,
        )
    if not len(row.languages) == len(row.exercises) == len(ends):
        raise FormatError(
            f"{where}: languages and exercises do not match doc_ends",
            got=f"{len(row.languages)} languages, {len(row.exercises)} exercises",
            expected=f"{len(ends)} each, an empty text where a document has none",
            remedy=_REMEDY,
        )
    # Seen as unsigned a negative id is a large one: one pass instead of two.
    if (highest := int(row.tokens_T.view(np.uint32).max())) >= VOCAB_SIZE:
        raise FormatError(
            f"{where}: a token id is outside the vocabulary",
            got=int(np.uint32(highest).view(np.int32)),
            expected=f"0..{VOCAB_SIZE - 1}",
            remedy=_REMEDY,
        )


class TokenShard(MappedShard[TokenViews]):
    """Reads one token shard. Raises FormatError when the file is not exactly the shard that is asked for."""

    def __init__(
        self,
        folder: Path,
        entry: FileEntry,
        *,
        dataset_id: str,
        split: Split,
        shard: int,
        seq_len: int,
    ) -> None:
        self._seq_len = seq_len
        self._place = {"dataset_id": dataset_id, "split": split, "shard": shard}
        schema = _token_schema(dataset_id, split, shard, seq_len)
        super().__init__(folder, entry, schema, _REMEDY)

    def row(self, index: int) -> PackedRow:
        """Row `index` as read-only views, its hash checked. Raises FormatError, IndexError."""
        views, i = self._locate(index)
        try:
            row = views.row(i)
        except UnicodeDecodeError as error:
            self._fail(f"row {index} is damaged: a label is no UTF-8", got=f"'{error}'")
        if (found := hash_row(row, **self._place, index=index)) != row.row_hash:
            self._fail(
                f"row {index} is damaged: its hash differs",
                got=f"{found:016x}",
                expected=f"{row.row_hash:016x}",
            )
        check_row(row, self._seq_len, f"shard {self.path} row {index} is damaged")
        return row

    def documents_per_row(self) -> np.ndarray:
        """Documents of each row: int64 [num_rows], from Arrow's offsets; no token is read. Raises FormatError."""
        parts = [np.empty(0, dtype=np.int64)]
        for batch in range(len(self._views)):
            views = self._views[batch] or self._load(batch)
            parts.append(np.diff(views.doc_offsets))
        return np.concatenate(parts)

    def _views_of(self, batch: pa.RecordBatch) -> TokenViews:
        return token_views(batch, self._seq_len)


@dataclass(frozen=True, slots=True)
class _BlobViews:
    offsets: np.ndarray
    content: memoryview
    present: np.ndarray
    row_hashes: np.ndarray
    blob_hashes: np.ndarray


class TargetShard(MappedShard[_BlobViews]):
    """Reads one target shard. Raises FormatError when the file is not exactly the shard that is asked for."""

    def __init__(
        self, folder: Path, entry: FileEntry, *, target_id: str, split: Split, shard: int
    ) -> None:
        self._place = {"target_id": target_id, "split": split, "shard": shard}
        schema = _target_schema(target_id, split, shard)
        super().__init__(folder, entry, schema, _TARGET_REMEDY)

    def blob(self, index: int, row_hash: int) -> bytes | None:
        """The blob of row `index`, or None when that row was not scored; its hash checked.

        row_hash: of the token row it must score. Raises FormatError (damage), AlignmentError (intact targets of
        other tokens), IndexError.
        """
        views, i = self._locate(index)
        stored_row_hash, present = int(views.row_hashes[i]), bool(views.present[i])
        blob = bytes(views.content[int(views.offsets[i]) : int(views.offsets[i + 1])])
        found = hash_blob(blob, stored_row_hash, **self._place, index=index)
        # An empty blob hashes as a null one: only the writer's rule that none exists tells a flipped validity bit.
        if found != int(views.blob_hashes[i]) or present != bool(blob):
            self._fail(
                f"row {index} is damaged: its hash differs",
                got=f"{found:016x}",
                expected=f"{int(views.blob_hashes[i]):016x}",
            )
        if stored_row_hash != row_hash:
            raise AlignmentError(
                f"shard {self.path} row {index} holds the targets of other tokens",
                got=f"row hash {stored_row_hash:016x}",
                expected=f"{row_hash:016x}",
                remedy="score this dataset again",
            )
        return blob if present else None

    def scored_rows(self) -> np.ndarray:
        """Which rows have a blob: bool [num_rows], from Arrow's validity and offsets; no blob is read.

        Raises FormatError where the two disagree: no writer writes an empty blob.
        """
        parts = [np.empty(0, dtype=bool)]
        for batch in range(len(self._views)):
            views = self._views[batch] or self._load(batch)
            if not np.array_equal(views.present, np.diff(views.offsets) > 0):
                self._fail(
                    f"marks a row of batch {batch} as scored that has no blob, or the reverse"
                )
            parts.append(views.present)
        return np.concatenate(parts)

    def _views_of(self, batch: pa.RecordBatch) -> _BlobViews:
        blobs, row_hashes, blob_hashes = batch.columns
        if row_hashes.null_count or blob_hashes.null_count:
            raise ValueError("null values in a column that has none")
        _, offsets, content = blobs.buffers()
        return _BlobViews(
            offsets=np.frombuffer(offsets, np.int64, len(blobs) + 1, blobs.offset * 8),
            content=memoryview(content) if content is not None else memoryview(b""),
            present=as_numpy(blobs.is_valid(), copy=True),
            row_hashes=as_numpy(row_hashes),
            blob_hashes=as_numpy(blob_hashes),
        )


def _token_schema(dataset_id: str, split: Split, shard: int, seq_len: int) -> pa.Schema:
    metadata = shard_metadata("tokens", split, shard, dataset_id=dataset_id, seq_len=seq_len)
    return pa.schema(token_fields(seq_len), metadata)


def _target_schema(target_id: str, split: Split, shard: int) -> pa.Schema:
    fields = [
        pa.field("blob", pa.large_binary()),
        pa.field("row_hash", pa.uint64(), nullable=False),
        pa.field("blob_hash", pa.uint64(), nullable=False),
    ]
    return pa.schema(fields, shard_metadata("targets", split, shard, target_id=target_id))


def shard_metadata(kind: str, split: Split, shard: int, **more: object) -> dict[str, str]:
    """The schema metadata of a shard: what it is and where it belongs."""
    values = {"format": FORMAT_VERSION, "kind": kind, "split": split, "shard": shard, **more}
    return {f"vpmoe.{key}": str(value) for key, value in values.items()}


def place_bytes(identity: str, split: Split, shard: int, index: int) -> bytes:
    """The place that leads every hash of a row. identity: dataset_id or target_id, hex."""
    return _PLACE.pack(bytes.fromhex(identity), SPLITS.index(split), shard, index)


def grouped(items: Iterable[Item]) -> Iterator[tuple[int, list[Item]]]:
    """(number of the first, up to BATCH_ROWS items), until the items end."""
    iterator = iter(items)
    for first in itertools.count(step=BATCH_ROWS):
        if not (group := list(itertools.islice(iterator, BATCH_ROWS))):
            return
        yield first, group
