"""`vpmoe-data verify`: every hash and every invariant of a dataset and of the targets beside it.

One job a shard, with the target shards beside it, on worker processes; then what only the whole can tell (duplicate
documents, counts, budgets). Faults are merged in the order of shards, so the first of a kind is always the same one.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from datastore.id_order import IdOrder
from datastore.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    TargetManifest,
    load_dataset_manifest,
)
from datastore.reader import Dataset, TargetStore
from datastore.shard import DOC_ID_BYTES, FileEntry, TargetShard, TokenShard, shard_name
from datastore.target import row_target
from datastore.types import SPLITS, PackedRow, Split
from datastore.workers import run_jobs


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


def verify_dataset(folder: Path, *, workers: int = 1) -> list[Fault]:
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
    _verify_unlisted(folder, dataset.manifest, "", faults)
    for store in stores:
        _verify_unlisted(store.path, store.manifest, _prefix(store.manifest.slug), faults)
    reports = _shard_reports(dataset, stores, workers)
    for report in reports:
        faults.merge(report.faults)
    _verify_counts(dataset.manifest, reports, faults)
    _verify_identities(reports, faults)
    for store in stores:
        _verify_budget(store.manifest, reports, faults)
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

    def add(self, kind: str, file: str, row: int | None, message: str, count: int = 1) -> None:
        self._first.setdefault(kind, Fault(kind, file, row, message))
        self._counts[kind] = self._counts.get(kind, 0) + count

    def merge(self, other: Faults) -> None:
        for fault in other.found():
            self.add(fault.kind, fault.file, fault.row, fault.message, fault.count)

    def found(self) -> list[Fault]:
        return [
            Fault(kind, fault.file, fault.row, fault.message, self._counts[kind])
            for kind, fault in self._first.items()
        ]


@dataclass(frozen=True)
class TargetJob:
    """The target shard of one teacher beside a token shard."""

    slug: str
    folder: Path
    entry: FileEntry
    target_id: str
    threshold: float
    order: IdOrder


@dataclass(frozen=True)
class ShardJob:
    """One token shard and the target shards beside it; all that a worker needs."""

    folder: Path
    entry: FileEntry
    dataset_id: str
    split: Split
    shard: int
    seq_len: int
    targets: tuple[TargetJob, ...]


@dataclass
class TargetReport:
    """What was recounted of one target shard. is_whole: every target could be read, so the sums mean something."""

    tally: TargetTally
    is_whole: bool = True


@dataclass
class ShardReport:
    """What was found in one shard. is_whole: every row could be read.

    doc_ids: 16 bytes each. read_rows: numbers of the rows that could be read; doc_ends: documents up to each of them.
    """

    split: Split
    shard: int
    tally: RowTally
    targets: dict[str, TargetReport]
    faults: Faults = field(default_factory=Faults)
    is_whole: bool = True
    doc_ids: bytearray = field(default_factory=bytearray)
    read_rows: array[int] = field(default_factory=lambda: array("q"))
    doc_ends: array[int] = field(default_factory=lambda: array("q"))

    def add(self, row: PackedRow, index: int) -> None:
        """Count a row that could be read."""
        self.tally.add(row)
        self.doc_ids += b"".join(row.doc_ids)
        self.read_rows.append(index)
        self.doc_ends.append(self.tally.documents)


def verify_shard(job: ShardJob) -> ShardReport:
    """Hash the files of a job, then read every row with its targets."""
    name, place = job.entry.name, {"split": job.split, "shard": job.shard}
    reports = {target.slug: TargetReport(TargetTally(target.threshold)) for target in job.targets}
    report = ShardReport(tally=RowTally(job.seq_len), targets=reports, **place)
    verify_file(job.folder, job.entry, "", report.faults)
    for target in job.targets:
        verify_file(target.folder, target.entry, _prefix(target.slug), report.faults)
    try:
        tokens = TokenShard(
            job.folder, job.entry, dataset_id=job.dataset_id, seq_len=job.seq_len, **place
        )
    except FormatError as error:
        report.faults.add("shard", name, None, str(error))
        report.is_whole = False
        return report
    beside = list(_open_target_shards(job, report))
    for index in range(tokens.num_rows):
        try:
            row = tokens.row(index)
        except FormatError as error:
            report.faults.add("row", name, index, str(error))
            report.is_whole = False
            continue
        report.add(row, index)
        _verify_row(row, name, index, report.faults)
        for target, shard in beside:
            _verify_targets(target, shard, index, row, report)
    return report


def verify_file(folder: Path, entry: FileEntry, prefix: str, faults: Faults) -> None:
    """Presence, size and sha256 of a listed file; `prefix` leads its name in a fault."""
    path, name = folder / entry.name, prefix + entry.name
    if not path.is_file():
        faults.add("missing file", name, None, "it is listed and absent")
    elif (size := path.stat().st_size) != entry.bytes:
        faults.add("file size", name, None, f"{size} bytes, the manifest lists {entry.bytes}")
    elif (found := sha256_file(path)) != entry.sha256:
        faults.add("file sha256", name, None, f"{found}, the manifest lists {entry.sha256}")


def _open_target_shards(
    job: ShardJob, report: ShardReport
) -> Iterator[tuple[TargetJob, TargetShard]]:
    place = {"split": job.split, "shard": job.shard}
    for target in job.targets:
        try:
            yield (
                target,
                TargetShard(target.folder, target.entry, target_id=target.target_id, **place),
            )
        except FormatError as error:
            file = _prefix(target.slug) + target.entry.name
            report.faults.add("target shard", file, None, str(error))
            report.targets[target.slug].is_whole = False


def _verify_row(row: PackedRow, name: str, index: int, faults: Faults) -> None:
    try:
        check_padding(row)
    except FormatError as error:
        faults.add("padding", name, index, str(error))
    for number, where in enumerate(row.documents()):
        try:
            check_document(row.tokens_T[where], row.spans_T[where])
        except FormatError as error:
            faults.add("document", name, index, f"document {number}: {error}")


def _verify_targets(
    target: TargetJob, shard: TargetShard, index: int, row: PackedRow, report: ShardReport
) -> None:
    try:
        blob = shard.blob(index, row.row_hash)
        if blob is None:
            return
        documents = codec.decode_blob(blob, row, target.order)
        sparse = row_target(documents, row)
        if sparse.threshold != target.threshold:
            raise FormatError("threshold", got=sparse.threshold, expected=target.threshold)
    except (FormatError, AlignmentError) as error:
        kind = "targets" if isinstance(error, FormatError) else "alignment of targets"
        report.faults.add(kind, _prefix(target.slug) + target.entry.name, index, str(error))
        report.targets[target.slug].is_whole = False
        return
    report.targets[target.slug].tally.add(report.split, row, documents, sparse, blob)


def _open_stores(dataset: Dataset, faults: Faults) -> Iterator[TargetStore]:
    for slug in target_slugs(dataset.path):
        try:
            store = TargetStore.open(dataset, slug, check_sizes=False)
            if store.manifest.slug != slug:
                raise FormatError("the slug", got=store.manifest.slug, expected=slug)
            require_same_source(store.manifest, dataset.manifest)
            yield store
        except VpmoeError as error:
            faults.add("target manifest", f"targets/{slug}/{MANIFEST_NAME}", None, str(error))


def _verify_unlisted(
    folder: Path, manifest: DatasetManifest | TargetManifest, prefix: str, faults: Faults
) -> None:
    for split in SPLITS:
        listed = {entry.name for entry in manifest.entries(split)}
        for path in sorted((folder / split).glob("*.arrow")):
            if (name := f"{split}/{path.name}") not in listed:
                faults.add("unlisted file", prefix + name, None, "the manifest does not list it")


def _shard_reports(dataset: Dataset, stores: list[TargetStore], workers: int) -> list[ShardReport]:
    """The reports of all shards, in order."""
    manifest = dataset.manifest
    jobs = [
        ShardJob(
            folder=dataset.path,
            entry=entry,
            dataset_id=manifest.dataset_id,
            split=split,
            shard=shard,
            seq_len=manifest.seq_len,
            targets=tuple(_target_job(store, split, shard) for store in stores),
        )
        for split in SPLITS
        for shard, entry in enumerate(manifest.entries(split))
    ]
    reports = []
    with logs.progress("verify", sum(job.entry.rows for job in jobs), "rows") as bar:
        for report in run_jobs(verify_shard, jobs, workers=workers):
            bar.advance(manifest.entries(report.split)[report.shard].rows)
            reports.append(report)
    return sorted(reports, key=lambda report: (SPLITS.index(report.split), report.shard))


def _target_job(store: TargetStore, split: Split, shard: int) -> TargetJob:
    manifest = store.manifest
    return TargetJob(
        slug=manifest.slug,
        folder=store.path,
        entry=manifest.entries(split)[shard],
        target_id=manifest.target_id,
        threshold=manifest.threshold,
        order=store.order,
    )


def _verify_counts(manifest: DatasetManifest, reports: list[ShardReport], faults: Faults) -> None:
    for split in SPLITS:
        own = [report for report in reports if report.split == split]
        if not all(report.is_whole for report in own) or not (own or split in manifest.counts):
            continue
        tally = RowTally(manifest.seq_len)
        for report in own:
            tally.merge(report.tally)
        found, stated = tally.counts(), manifest.counts.get(split)
        if stated != found:
            message = f"{split}: the manifest states {stated}, the rows hold {found}"
            faults.add("counts", MANIFEST_NAME, None, message)


def _verify_budget(manifest: TargetManifest, reports: list[ShardReport], faults: Faults) -> None:
    targets = [report.targets[manifest.slug] for report in reports]
    if not all(report.is_whole for report in (*reports, *targets)):
        return  # the sums of a part say nothing
    tally, file = TargetTally(manifest.threshold), _prefix(manifest.slug) + MANIFEST_NAME
    for target in targets:
        tally.merge(target.tally)
    try:
        budget = Budget.model_validate(manifest.budget)
    except ValueError as error:
        faults.add("budget", file, None, str(error))
        return
    for difference in tally.differences(budget):
        faults.add("budget", file, None, difference)
    for split, stated in manifest.counts.items():
        found = tally.by_split.get(split, {"documents": 0, "tokens": 0})
        if stated != found:
            faults.add("target counts", file, None, f"{split}: manifest {stated}, stored {found}")


def _verify_identities(reports: list[ShardReport], faults: Faults) -> None:
    """No document twice, over all shards."""
    starts = list(itertools.accumulate((r.tally.documents for r in reports), initial=0))
    doc_ids = b"".join(report.doc_ids for report in reports)
    for document in duplicate_documents(doc_ids).tolist():
        number = bisect.bisect_right(starts, document) - 1
        report = reports[number]
        row = report.read_rows[bisect.bisect_right(report.doc_ends, document - starts[number])]
        name = doc_ids[document * DOC_ID_BYTES : (document + 1) * DOC_ID_BYTES].hex()
        file = shard_name(report.split, report.shard)
        faults.add("duplicate document", file, row, f"document {name} came before")


def _prefix(slug: str) -> str:
    return f"targets/{slug}/"
