"""The raw input: parquet files in the SYNTH schema, local or from a hub dataset at a pinned revision.

Files are taken in the order of their names; rows are numbered through all of them. A unit is a range of those rows.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import field_validator, model_validator

from common.config import Config
from common.errors import SourceError
from common.files import sha256_file
from datastore.manifest import SourceFile
from datastore.types import SourceRow

COLUMNS = tuple(SourceRow.__dataclass_fields__)
_BATCH_ROWS = 1024
_ID_BATCH_ROWS = 65_536
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubConfig(Config):
    """A dataset of parquet files on the hub. revision: a full commit, so that the input can never move."""

    repo: str
    revision: str
    split: str = "train"

    @field_validator("revision")
    @classmethod
    def _is_commit(cls, revision: str) -> str:
        if not _COMMIT.fullmatch(revision):
            raise ValueError("a full commit of 40 hex digits is needed, not a branch or tag")
        return revision


class SourceConfig(Config):
    """Where the rows come from: `files` (paths or globs) when given, else `hub`."""

    files: tuple[str, ...] = ()
    hub: HubConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _files_win(cls, raw: Any) -> Any:
        return {**raw, "hub": None} if isinstance(raw, dict) and raw.get("files") else raw

    @model_validator(mode="after")
    def _one_is_given(self) -> SourceConfig:
        if not self.files and self.hub is None:
            raise ValueError("give `files` (parquet paths or globs) or `hub` (repo, revision)")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePath:
    """A source file: where it lies here, and the name that the manifest keeps."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Rows start .. start + rows - 1 of one file."""

    path: Path
    start: int
    rows: int


def locate_sources(config: SourceConfig) -> list[SourcePath]:
    """The source files by name (code points, then path). Raises SourceError when there are none."""
    found = _local_files(config.files) if config.files else _hub_files(config.hub)
    return sorted(found, key=lambda source: (source.name, str(source.path)))


def inspect_source(source: SourcePath) -> SourceFile:
    """Size, sha256 and rows of a file whose columns fit. Raises SourceError naming file and column."""
    file = _open_parquet(source.path)
    _check_columns(file.schema_arrow, source.path)
    return SourceFile(
        name=source.name,
        bytes=source.path.stat().st_size,
        sha256=sha256_file(source.path),
        rows=file.metadata.num_rows,
    )


def cut_units(
    paths: Sequence[Path], rows_per_file: Sequence[int], unit_rows: int
) -> list[tuple[Segment, ...]]:
    """The rows of all files one after the other, cut into units of `unit_rows` (the last may be shorter).

    A unit may span files: many small files do not make many small shards.
    """
    units: list[tuple[Segment, ...]] = []
    open_unit: list[Segment] = []
    room = unit_rows
    for path, num_rows in zip(paths, rows_per_file, strict=True):
        start = 0
        while start < num_rows:
            taken = min(room, num_rows - start)
            open_unit.append(Segment(path=path, start=start, rows=taken))
            start, room = start + taken, room - taken
            if room == 0:
                units.append(tuple(open_unit))
                open_unit, room = [], unit_rows
    return [*units, tuple(open_unit)] if open_unit else units


def read_segment(segment: Segment) -> Iterator[SourceRow]:
    """The rows of a segment, read in small batches from the row groups that hold it. Raises SourceError."""
    file = _open_parquet(segment.path)
    groups, skip = _groups_of(file.metadata, segment)
    left = segment.rows
    try:
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(COLUMNS)):
            wanted = batch.slice(min(skip, len(batch)), left)
            skip -= min(skip, len(batch))
            left -= len(wanted)
            texts = [_texts(wanted.column(name)) for name in COLUMNS]
            for values in zip(*texts, strict=True):
                yield SourceRow(**dict(zip(COLUMNS, values, strict=True)))
            if left == 0:
                return
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(segment.path, error) from None


def read_ids(path: Path) -> Iterator[str | None]:
    """The synth_id of every row of a file, from that column alone. Raises SourceError."""
    try:
        for batch in _open_parquet(path).iter_batches(_ID_BATCH_ROWS, columns=["synth_id"]):
            yield from _texts(batch.column("synth_id"))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _local_files(patterns: Sequence[str]) -> list[SourcePath]:
    paths: dict[Path, Path] = {}
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        files = [path for path in matches if path.is_file()]
        if not files:
            raise SourceError(
                f"source.files: nothing matches '{pattern}'",
                expected="existing parquet files",
                remedy="check the path; relative paths start from the current folder",
            )
        paths |= {path.resolve(): path for path in files}
    return [SourcePath(name=path.name, path=path) for path in paths.values()]


def _hub_files(hub: HubConfig) -> list[SourcePath]:
    """The parquet files of a hub dataset, fetched into the hub's own cache by `datasets`.

    The files themselves are read, not an Arrow copy of them: SYNTH is 236 GB as parquet.
    """
    import datasets

    remedy = (
        "check name, revision, network and HF_HUB_OFFLINE, or name local copies in source.files"
    )
    what = f"hub dataset {hub.repo} at {hub.revision}, split '{hub.split}'"
    try:
        splits = datasets.load_dataset_builder(hub.repo, revision=hub.revision).config.data_files
        files = [str(file) for file in (splits or {}).get(hub.split, [])]
        if not files or not all(file.endswith(".parquet") for file in files):
            got = ", ".join(files[:3]) or f"no files (splits: {', '.join(map(str, splits or []))})"
            raise SourceError(what, got=got, expected="parquet files")
        local = datasets.DownloadManager(dataset_name=hub.repo).download(files)
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(f"{what} cannot be read: {error}", remedy=remedy) from None
    return [
        SourcePath(name=file.rsplit("/", 1)[-1], path=Path(path))
        for file, path in zip(files, local, strict=True)
    ]


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _check_columns(schema: pa.Schema, path: Path) -> None:
    for name in COLUMNS:
        if name not in schema.names:
            raise SourceError(
                f"source file {path} has no column '{name}'",
                got=", ".join(schema.names),
                expected="the SYNTH schema",
            )
        if not _holds_text(found := schema.field(name).type):
            raise SourceError(
                f"source file {path}: column '{name}' is not text", got=found, expected="string"
            )


def _holds_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_kind(type_) for is_kind in (*kinds, pa.types.is_null))


def _groups_of(metadata: pq.FileMetaData, segment: Segment) -> tuple[list[int], int]:
    """The row groups that hold a segment, and how many rows of the first come before it."""
    groups, skip, first = [], 0, 0
    for group in range(metadata.num_row_groups):
        end = first + metadata.row_group(group).num_rows
        if end > segment.start and first < segment.start + segment.rows:
            skip = skip if groups else segment.start - first
            groups.append(group)
        first = end
    return groups, skip


def _texts(column: pa.Array) -> list[str | None]:
    """Python strings. Bytes that are no UTF-8 become lone surrogates, which the renderer rejects by reason."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        values = column.cast(pa.large_binary()).to_pylist()
        return [v if v is None else v.decode("utf-8", "surrogateescape") for v in values]


def _unreadable(path: Path, error: Exception) -> SourceError:
    return SourceError(
        f"source file {path} cannot be read: {error}", remedy="fetch or write the file again"
    )
