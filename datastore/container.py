"""The container beneath a shard: an Arrow IPC file, written atomically while hashing, read through a checked map.

Only lengths that Arrow has validated are ever turned into views, and numpy slices clamp: a flipped offset cannot
reach outside the map. Row hashes (datastore/shard.py) then decide whether the numbers are right.
"""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Generic, NoReturn, TypeVar

import numpy as np
import pyarrow as pa

from common.config import Config
from common.errors import FormatError
from common.files import atomic_writer

BATCH_ROWS = 64
Views = TypeVar("Views")


class FileEntry(Config):
    """A shard as its manifest lists it. name: "train/shard-00000.arrow". sha256: hex, of the whole file."""

    name: str
    rows: int
    bytes: int
    sha256: str


class MappedShard(abc.ABC, Generic[Views]):
    """A memory-mapped shard whose structure was checked; views of a batch are made once, at its first read.

    Holds no file descriptor: Arrow's map outlives its file. Not for sharing by pickle; reopen by path instead.
    """

    def __init__(
        self,
        folder: Path,
        entry: FileEntry,
        schema: pa.Schema,
        remedy: str,
    ) -> None:
        self.path = Path(folder) / entry.name
        self.num_rows = entry.rows
        self._bytes, self._remedy = entry.bytes, remedy
        self._check_size()
        try:
            with pa.memory_map(str(self.path)) as source:
                self._reader = pa.ipc.open_file(pa.BufferReader(source.read_buffer()))
            found = self._reader.schema
        except (pa.ArrowException, OSError, ValueError) as error:
            self._fail("is not a readable Arrow file", got=f"'{error}'")
        self._check_schema(found, schema)
        batches = -(-entry.rows // BATCH_ROWS)
        if self._reader.num_record_batches != batches:
            self._fail(
                "holds another number of record batches",
                got=self._reader.num_record_batches,
                expected=batches,
            )
        self._views: list[Views | None] = [None] * batches

    def _locate(self, index: int) -> tuple[Views, int]:
        """The views of the batch that holds row `index`, and the row's number in it."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"{self.path}: row {index} of {self.num_rows}")
        # A file that shrinks under its map kills the process (SIGBUS) at the first touch; one stat is 1 us.
        self._check_size()
        batch, offset = divmod(index, BATCH_ROWS)
        if (views := self._views[batch]) is None:
            views = self._views[batch] = self._load(batch)
        return views, offset

    def _load(self, batch: int) -> Views:
        rows = min(BATCH_ROWS, self.num_rows - batch * BATCH_ROWS)
        where = f"rows {batch * BATCH_ROWS}..{batch * BATCH_ROWS + rows - 1} are damaged"
        try:
            record_batch = self._reader.get_batch(batch)
            # Full validation looks at buffer sizes and offsets alone: 64 rows cost microseconds.
            record_batch.validate(full=True)
            if record_batch.num_rows != rows:
                self._fail(where, got=f"{record_batch.num_rows} rows", expected=rows)
            return self._views_of(record_batch)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            self._fail(where, got=f"'{error}'")

    @abc.abstractmethod
    def _views_of(self, batch: pa.RecordBatch) -> Views:
        """Views of a batch whose buffers and offsets are valid. Raises ValueError for what a writer never writes."""

    def _check_size(self) -> None:
        try:
            size = os.stat(self.path).st_size
        except FileNotFoundError:
            self._fail("is missing")
        if size != self._bytes:
            self._fail("has the wrong size", got=f"{size} bytes", expected=f"{self._bytes}")

    def _check_schema(self, found: pa.Schema, expected: pa.Schema) -> None:
        if found.equals(expected, check_metadata=True):
            return
        got, want = (schema.metadata or {} for schema in (found, expected))
        for key in want:
            if got.get(key) != want[key]:
                self._fail(
                    f"is another shard: {key.decode()} differs",
                    got=got.get(key, b"nothing").decode(errors="replace"),
                    expected=want[key].decode(),
                )
        self._fail("has other columns", expected=expected.names)

    def _fail(self, what: str, **details: object) -> NoReturn:
        raise FormatError(f"shard {self.path} {what}", **details, remedy=self._remedy) from None


class _Hashing:
    """A write-only file that hashes and counts what passes, so that nothing is read back."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self._digest, self.bytes = handle, hashlib.sha256(), 0
        self.closed = False

    def write(self, content: pa.Buffer | bytes) -> int:
        self._handle.write(content)
        self._digest.update(content)
        size = memoryview(content).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        self._handle.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def write_container(
    folder: Path, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> FileEntry:
    """Write folder/name from record batches, streamed; a failing iterator commits nothing."""
    rows = 0
    with atomic_writer(folder / name) as handle:
        sink = _Hashing(handle)
        options = pa.ipc.IpcWriteOptions(compression=None)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema, options=options) as writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += len(batch)
    return FileEntry(name=name, rows=rows, bytes=sink.bytes, sha256=sink.hexdigest())


def as_numpy(array: pa.Array, *, copy: bool = False) -> np.ndarray:
    """A read-only view of a column without nulls, or a copy where Arrow's form differs (booleans)."""
    return array.to_numpy(zero_copy_only=not copy)
