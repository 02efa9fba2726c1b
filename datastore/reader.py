"""Reading a dataset and its teacher targets by (split, index). Opening checks the manifest and the files' sizes.

Objects are cheap to pickle (a path and a fingerprint) and safe to fork: nothing that is open has a position.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from common.errors import AlignmentError, FormatError
from datastore import codec
from datastore.id_order import IdOrder
from datastore.manifest import (
    DatasetManifest,
    TargetManifest,
    load_dataset_manifest,
    load_target_manifest,
    target_folder,
)
from datastore.row_set import RowSet
from datastore.shard import FileEntry, TargetShard, TokenShard
from datastore.types import SPLITS, DocTarget, PackedRow, Split

# Open shards kept for each store: maps and views only (no file descriptors), about 0.1 MB of Python objects a shard.
OPEN_SHARDS = 64
Opened = TypeVar("Opened")


class Dataset:
    """A dataset folder opened for reading; indices of a split count over its shards in order."""

    def __init__(self, path: Path, manifest: DatasetManifest) -> None:
        self.path, self.manifest = path, manifest
        self._index = _RowIndex(manifest)
        self._shard = _keep_open(open_token_shard, path, manifest)

    @classmethod
    def open(cls, path: Path | str, *, check_sizes: bool = True) -> Dataset:
        """Open a dataset; `check_sizes` also looks at the presence and size of every listed file.

        Raises FormatError naming the first file that is absent or of another size. Hashes of rows are checked when
        rows are read, those of whole files by `vpmoe-data verify`.
        """
        path = Path(path)
        manifest = load_dataset_manifest(path)
        if check_sizes:
            check_files(path, manifest, "build the dataset again, or restore the file")
        return cls(path, manifest)

    def num_rows(self, split: Split) -> int:
        """Packed rows of a split."""
        return self._index.num_rows(split)

    def locate(self, split: Split, index: int) -> tuple[int, int]:
        """(shard, row in the shard) of a row. Raises IndexError."""
        return self._index.locate(split, index)

    def row(self, split: Split, index: int) -> PackedRow:
        """A packed row as read-only views, its hash checked. Raises FormatError, IndexError."""
        shard, row = self.locate(split, index)
        return self._shard(split, shard).row(row)

    def shard_rows(
        self, split: Split, shard: int, first: int = 0, end: int | None = None
    ) -> Iterator[PackedRow]:
        """Rows first..end-1 of one shard (None: to its last), as `row` gives them. Raises FormatError."""
        opened = self._shard(split, shard)
        return (
            opened.row(index) for index in range(first, opened.num_rows if end is None else end)
        )

    def rows(self) -> Iterator[PackedRow]:
        """Every row in order, train before valid. Raises FormatError."""
        return (self.row(split, i) for split in SPLITS for i in range(self.num_rows(split)))

    def documents_per_row(self, split: Split) -> np.ndarray:
        """Documents of each row of a split, int64 [rows], without reading a token: 1.7 s for 10^6 rows.

        Raises FormatError, also where they are not as many as the manifest counts.
        """
        parts = [
            open_token_shard(self.path, self.manifest, split, shard).documents_per_row()
            for shard in range(len(self.manifest.entries(split)))
        ]
        documents_R = np.concatenate([np.empty(0, dtype=np.int64), *parts])
        counts = self.manifest.counts.get(split)
        if documents_R.sum() != (counts.documents if counts else 0):
            raise FormatError(
                f"the {split} rows of {self.path} hold another number of documents",
                got=documents_R.sum(),
                expected=counts.documents if counts else 0,
                remedy="restore the file; `vpmoe-data verify` lists every damaged file",
            )
        return documents_R

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen_dataset, (self.path, self.manifest.fingerprint)


class TargetStore:
    """The targets of one teacher for an open dataset, addressed like its rows."""

    def __init__(self, dataset: Dataset, manifest: TargetManifest) -> None:
        self.dataset, self.manifest = dataset, manifest
        self.path = target_folder(dataset.path, manifest.slug)
        self.order = IdOrder.read(self.path, manifest.id_order_sha256)
        self._shard = _keep_open(open_target_shard, self.path, manifest)

    @classmethod
    def open(cls, dataset: Dataset, slug: str, *, check_sizes: bool = True) -> TargetStore:
        """Open the targets of the teacher `slug`.

        Raises AlignmentError when they were scored for another dataset, FormatError when they are absent, incomplete,
        of another codec or cut into other shards than the dataset.
        """
        manifest = load_target_manifest(dataset.path, slug)
        folder = target_folder(dataset.path, slug)
        again = f"score it again with `vpmoe-data score --teacher {slug}`"
        if manifest.dataset_fingerprint != dataset.manifest.fingerprint:
            raise AlignmentError(
                f"the targets in {folder} were scored for another dataset",
                got=f"fingerprint {manifest.dataset_fingerprint}",
                expected=dataset.manifest.fingerprint,
                remedy=again,
            )
        if manifest.codec_version != codec.CODEC_VERSION:
            raise FormatError(
                f"the targets in {folder} have another codec version",
                got=manifest.codec_version,
                expected=codec.CODEC_VERSION,
                remedy=again,
            )
        _check_same_shards(folder, manifest, dataset.manifest, again)
        if check_sizes:
            check_files(folder, manifest, again)
        return cls(dataset, manifest)

    def blob(self, split: Split, index: int, row_hash: int) -> bytes | None:
        """The blob of a row, None when the row was not scored. Raises FormatError, AlignmentError, IndexError."""
        shard, row = self.dataset.locate(split, index)
        return self._shard(split, shard).blob(row, row_hash)

    def documents(self, split: Split, index: int, row: PackedRow) -> list[DocTarget | None] | None:
        """The targets of each document of `row`, which must be row `index`; None where it was not scored."""
        blob = self.blob(split, index, row.row_hash)
        return None if blob is None else codec.decode_blob(blob, row, self.order)

    def scored_rows(self, split: Split) -> RowSet:
        """The rows of a split that have targets: all when every document is counted as scored.

        Else read from the shards' validity without reading a blob: 0.7 s for 10^6 rows. Raises FormatError.
        """
        scored = self.manifest.counts.get(split, {}).get("documents")
        whole = self.dataset.manifest.counts.get(split)
        if whole is not None and scored == whole.documents:
            return RowSet(np.ones(self.dataset.num_rows(split), dtype=bool))
        parts = [
            open_target_shard(self.path, self.manifest, split, shard).scored_rows()
            for shard in range(len(self.manifest.entries(split)))
        ]
        return RowSet(np.concatenate([np.empty(0, dtype=bool), *parts]))

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen_targets, (self.dataset, self.manifest.slug, self.manifest.target_id)


def check_files(folder: Path, manifest: DatasetManifest | TargetManifest, remedy: str) -> None:
    """Raise FormatError naming the first listed file that is absent or whose size differs."""
    for entry in itertools.chain.from_iterable(manifest.files.values()):
        try:
            size = (folder / entry.name).stat().st_size
        except FileNotFoundError:
            raise FormatError(f"{folder / entry.name} is missing", remedy=remedy) from None
        if size != entry.bytes:
            raise FormatError(
                f"{folder / entry.name} has the wrong size",
                got=f"{size} bytes",
                expected=f"{entry.bytes}",
                remedy=remedy,
            )


def open_token_shard(
    folder: Path, manifest: DatasetManifest, split: Split, shard: int
) -> TokenShard:
    """Open one shard that the manifest lists. Raises FormatError."""
    return TokenShard(
        folder,
        manifest.entries(split)[shard],
        dataset_id=manifest.dataset_id,
        split=split,
        shard=shard,
        seq_len=manifest.seq_len,
    )


def open_target_shard(
    folder: Path, manifest: TargetManifest, split: Split, shard: int
) -> TargetShard:
    """Open one shard of a target folder that its manifest lists. Raises FormatError."""
    entry = manifest.entries(split)[shard]
    return TargetShard(folder, entry, target_id=manifest.target_id, split=split, shard=shard)


def _keep_open(
    opener: Callable[..., Opened], folder: Path, manifest: DatasetManifest | TargetManifest
) -> Callable[[Split, int], Opened]:
    """`opener` for (split, shard), keeping the last OPEN_SHARDS. Holds no reference to its store: no cycle, no wait."""
    return functools.lru_cache(maxsize=OPEN_SHARDS)(functools.partial(opener, folder, manifest))


class _RowIndex:
    """Row numbers of a split over its shards."""

    def __init__(self, manifest: DatasetManifest) -> None:
        self._ends = {
            split: list(itertools.accumulate(entry.rows for entry in entries))
            for split, entries in manifest.files.items()
        }

    def num_rows(self, split: Split) -> int:
        ends = self._ends.get(split)
        return ends[-1] if ends else 0

    def locate(self, split: Split, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_rows(split):
            raise IndexError(f"row {index} of {self.num_rows(split)} in split {split}")
        ends = self._ends[split]
        shard = bisect.bisect_right(ends, index)
        return shard, int(index) - (ends[shard - 1] if shard else 0)


def _check_same_shards(
    folder: Path, targets: TargetManifest, dataset: DatasetManifest, remedy: str
) -> None:
    def rows(entries: tuple[FileEntry, ...]) -> list[int]:
        return [entry.rows for entry in entries]

    for split in dataset.files.keys() | targets.files.keys():
        if rows(targets.entries(split)) != rows(dataset.entries(split)):
            raise FormatError(
                f"the {split} shards in {folder} do not stand beside those of the dataset",
                got=f"{len(targets.entries(split))} shards",
                expected=f"{len(dataset.entries(split))}, each with the rows of its token shard",
                remedy=remedy,
            )


def _reopen_dataset(path: Path, fingerprint: str) -> Dataset:
    dataset = Dataset.open(path, check_sizes=False)
    if dataset.manifest.fingerprint != fingerprint:
        raise FormatError(
            f"{path} was replaced while it was in use",
            got=dataset.manifest.fingerprint,
            expected=fingerprint,
            remedy="start the run again",
        )
    return dataset


def _reopen_targets(dataset: Dataset, slug: str, target_id: str) -> TargetStore:
    store = TargetStore.open(dataset, slug, check_sizes=False)
    if store.manifest.target_id != target_id:
        raise FormatError(
            f"{store.path} was replaced while it was in use",
            got=store.manifest.target_id,
            expected=target_id,
            remedy="start the run again",
        )
    return store
