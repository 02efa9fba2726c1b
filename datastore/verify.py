"""`vpmoe-data verify`: every hash and every invariant of a dataset and of the targets beside it."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import logs
from common.errors import AlignmentError, FormatError, VpmoeError
from common.files import sha256_file
from datastore import codec
from datastore.alignment import require_same_source
from datastore.budget import Budget
from datastore.checks import (
    RowTally,
    TargetTally,
    check_document,
    check_padding,
    duplicate_documents,
)
from datastore.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    TargetManifest,
    load_dataset_manifest,
)
from datastore.reader import Dataset, TargetStore, document_positions
from datastore.shard import DOC_ID_BYTES, shard_name
from datastore.target import row_target
from datastore.types import SPLITS, PackedRow, Split


@dataclass(frozen=True)
class Fault:
    """The first fault of a kind. file: relative to the dataset. row: within that file. count: of this kind in all."""

    kind: str
    file: str
    row: int | None
    message: str
    count: int = 1

    def __str__(self) -> str:
        where = self.file if self.row is None else f"{self.file} row {self.row}"
        more = f" (and {self.count - 1:,} more of this kind)" if self.count > 1 else ""
        return f"{self.kind}: {where}: {self.message}{more}"


def verify_dataset(folder: Path) -> list[Fault]:
    """The first fault of each kind in a dataset and every target store below it; empty when all is well.

    Reads every byte twice (file hashes, then rows). A store whose manifest cannot be believed has that one fault.
    """
    folder = Path(folder)
    faults = Faults()
    try:
        dataset = Dataset(folder, load_dataset_manifest(folder))
    except VpmoeError as error:
        return [Fault("manifest", MANIFEST_NAME, None, str(error))]
    stores = list(_open_stores(dataset, faults))
    verify_files(folder, dataset.manifest, "", faults)
    for store in stores:
        verify_files(store.store.path, store.store.manifest, store.prefix, faults)
    _verify_rows(dataset, stores, faults)
    return faults.found()


def summary(folder: Path) -> str:
    """One line on a verified dataset."""
    counts = load_dataset_manifest(folder).counts.values()
    figures = [
        f"{sum(split.rows for split in counts):,} rows",
        f"{sum(split.documents for split in counts):,} documents",
        f"{sum(split.tokens for split in counts):,} tokens",
    ]
    slugs = target_slugs(folder)
    targets = f"targets of {', '.join(slugs)}" if slugs else "no targets"
    return f"{folder}: every hash and invariant holds ({', '.join(figures)}; {targets})"


def target_slugs(folder: Path) -> list[str]:
    """The teachers whose targets are complete, by name; a folder without manifest is an unfinished stage."""
    return sorted(path.parent.name for path in Path(folder).glob(f"targets/*/{MANIFEST_NAME}"))


class Faults:
    """Keeps the first fault of each kind and counts the rest."""

    def __init__(self) -> None:
        self._first: dict[str, Fault] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, file: str, row: int | None, message: str) -> None:
        self._first.setdefault(kind, Fault(kind, file, row, message))
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def found(self) -> list[Fault]:
        return [
            Fault(kind, fault.file, fault.row, fault.message, self._counts[kind])
            for kind, fault in self._first.items()
        ]


@dataclass
class _Store:
    """A target store under verification, and what was recounted of it."""

    store: TargetStore
    tally: TargetTally
    is_whole: bool = True

    @property
    def prefix(self) -> str:
        return f"targets/{self.store.manifest.slug}/"


def verify_files(
    folder: Path, manifest: DatasetManifest | TargetManifest, prefix: str, faults: Faults
) -> None:
    """Presence, size and sha256 of every listed file, and no shard that is not listed."""
    entries = [entry for split in SPLITS for entry in manifest.entries(split)]
    with logs.progress(f"hash {prefix or 'shards'}", sum(e.bytes for e in entries), "B") as bar:
        for entry in entries:
            path = folder / entry.name
            if not path.is_file():
                faults.add("missing file", prefix + entry.name, None, "it is listed and absent")
            elif path.stat().st_size != entry.bytes:
                message = f"{path.stat().st_size} bytes, the manifest lists {entry.bytes}"
                faults.add("file size", prefix + entry.name, None, message)
            elif (found := sha256_file(path)) != entry.sha256:
                message = f"{found}, the manifest lists {entry.sha256}"
                faults.add("file sha256", prefix + entry.name, None, message)
            bar.advance(entry.bytes)
    listed = {entry.name for entry in entries}
    for split in SPLITS:
        for path in sorted((folder / split).glob("*.arrow")):
            if (name := f"{split}/{path.name}") not in listed:
                faults.add("unlisted file", prefix + name, None, "the manifest does not list it")


def _open_stores(dataset: Dataset, faults: Faults) -> Iterator[_Store]:
    for slug in target_slugs(dataset.path):
        try:
            store = TargetStore.open(dataset, slug, check_sizes=False)
            if store.manifest.slug != slug:
                raise FormatError("the slug", got=store.manifest.slug, expected=slug)
            require_same_source(store.manifest, dataset.manifest)
            yield _Store(store, TargetTally(store.manifest.threshold))
        except VpmoeError as error:
            faults.add("target manifest", f"targets/{slug}/{MANIFEST_NAME}", None, str(error))


def _verify_rows(dataset: Dataset, stores: list[_Store], faults: Faults) -> None:
    """One pass over all rows, each with its targets, and then what only the whole can tell."""
    manifest, identities = dataset.manifest, _Identities(dataset)
    total = sum(dataset.num_rows(split) for split in SPLITS)
    with logs.progress("verify rows", total, "rows") as bar:
        for split in SPLITS:
            tally, unread = RowTally(manifest.seq_len), 0
            for index in range(dataset.num_rows(split)):
                bar.advance(1)
                place = _place(dataset, split, index)
                try:
                    row = dataset.row(split, index)
                except FormatError as error:
                    faults.add("row", *place, str(error))
                    unread += 1
                    for store in stores:
                        store.is_whole = False
                    continue
                tally.add(row)
                identities.add(split, index, row)
                _verify_row(row, place, faults)
                for store in stores:
                    _verify_targets(store, split, index, row, faults)
            if not unread:
                _verify_counts(split, tally, manifest, faults)
    identities.verify(faults)
    for store in stores:
        if store.is_whole:  # else its sums say nothing more
            _verify_budget(store, faults)


def _verify_row(row: PackedRow, place: tuple[str, int], faults: Faults) -> None:
    try:
        check_padding(row)
    except FormatError as error:
        faults.add("padding", *place, str(error))
    for number, where in enumerate(row.documents()):
        try:
            check_document(row.tokens_T[where], row.spans_T[where])
        except FormatError as error:
            faults.add("document", *place, f"document {number}: {error}")


def _verify_targets(
    store: _Store, split: Split, index: int, row: PackedRow, faults: Faults
) -> None:
    file, number = _place(store.store.dataset, split, index)
    try:
        blob = store.store.blob(split, index, row.row_hash)
        if blob is None:
            return
        documents = codec.decode_blob(blob, document_positions(row))
        target = row_target(documents, row)
        if target.threshold != store.tally.threshold:
            raise FormatError("threshold", got=target.threshold, expected=store.tally.threshold)
    except (FormatError, AlignmentError) as error:
        kind = "targets" if isinstance(error, FormatError) else "alignment of targets"
        faults.add(kind, store.prefix + file, number, str(error))
        store.is_whole = False
        return
    store.tally.add(split, row, documents, target, blob)


def _verify_counts(
    split: Split, tally: RowTally, manifest: DatasetManifest, faults: Faults
) -> None:
    found, stated = tally.counts(), manifest.counts.get(split)
    if stated is None and not found.rows:
        return
    if stated != found:
        message = f"{split}: the manifest states {stated}, the rows hold {found}"
        faults.add("counts", MANIFEST_NAME, None, message)


def _verify_budget(store: _Store, faults: Faults) -> None:
    file, manifest = store.prefix + MANIFEST_NAME, store.store.manifest
    try:
        budget = Budget.model_validate(manifest.budget)
    except ValueError as error:
        faults.add("budget", file, None, str(error))
        return
    for difference in store.tally.differences(budget):
        faults.add("budget", file, None, difference)
    for split, stated in manifest.counts.items():
        found = store.tally.by_split.get(split, {"documents": 0, "tokens": 0})
        if stated != found:
            faults.add("target counts", file, None, f"{split}: manifest {stated}, stored {found}")


class _Identities:
    """The ids of all documents, 16 bytes each, and which row each came from."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._ids, self._ends = bytearray(), array("q")
        self._splits, self._indices = bytearray(), array("q")

    def add(self, split: Split, index: int, row: PackedRow) -> None:
        self._ids += b"".join(row.doc_ids)
        self._ends.append(len(self._ids) // DOC_ID_BYTES)
        self._splits.append(SPLITS.index(split))
        self._indices.append(index)

    def verify(self, faults: Faults) -> None:
        for document in duplicate_documents(self._ids).tolist():
            row = bisect.bisect_right(self._ends, document)
            place = _place(self._dataset, SPLITS[self._splits[row]], self._indices[row])
            start = document * DOC_ID_BYTES
            name = self._ids[start : start + DOC_ID_BYTES].hex()
            faults.add("duplicate document", *place, f"document {name} came before")


def _place(dataset: Dataset, split: Split, index: int) -> tuple[str, int]:
    shard, row = dataset.locate(split, index)
    return shard_name(split, shard), row
