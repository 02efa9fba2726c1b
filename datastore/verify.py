"""`vpmoe-data verify`: every hash and every invariant of a dataset and of the targets beside it.

One job a shard, with the target shards beside it, on worker processes; then what only the whole can tell (duplicate
documents, counts, budgets). Faults are merged in the order of shards, so the first of a kind is always the same one.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import logs
from common.errors import FormatError, VpmoeError
from datastore.alignment import require_same_source
from datastore.checks import RowTally, check_document, check_padding, duplicate_documents
from datastore.faults import Fault, Faults, verify_file
from datastore.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    SampledCounts,
    load_dataset_manifest,
)
from datastore.reader import Dataset, TargetStore
from datastore.shard import DOC_ID_BYTES, FileEntry, TokenShard, shard_name
from datastore.types import SPLITS, PackedRow, Split
from datastore.verify_rollouts import PREFIX, RolloutCheck, RolloutJob, verify_rollout_counts
from datastore.verify_targets import (
    TargetCheck,
    TargetJob,
    TargetReport,
    store_selection,
    target_job,
    target_prefix,
    verify_store,
)
from datastore.workers import run_jobs


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
    info = dataset.manifest.rollouts
    _verify_unlisted(folder, dataset.manifest.files, "", faults)
    if info is not None:
        _verify_unlisted(folder / PREFIX, info.files, PREFIX, faults)
    for store in stores:
        prefix = target_prefix(store.manifest.slug)
        _verify_unlisted(store.path, store.manifest.files, prefix, faults)
        if store.manifest.logprobs is not None:
            logprobs = store.manifest.logprobs
            _verify_unlisted(store.path / "logprobs", logprobs, f"{prefix}logprobs/", faults)
    reports = shard_reports(_shard_jobs(dataset, stores), workers)
    for report in reports:
        faults.merge(report.faults)
    _verify_counts(dataset.manifest, reports, faults)
    if info is not None:
        found = {split: [r.sampled for r in reports if r.split == split] for split in SPLITS}
        verify_rollout_counts(info, found, faults)
    verify_identities(reports, faults)
    for store in stores:
        of_store: dict[Split, list[TargetReport]] = {split: [] for split in SPLITS}
        for report in reports:
            of_store[report.split].append(report.targets[store.manifest.slug])
        verify_store(store.manifest, of_store, faults)
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


@dataclass(frozen=True)
class ShardJob:
    """One token shard and the target shards beside it; all that a worker needs. rollouts: None but for a buffer."""

    folder: Path
    entry: FileEntry
    dataset_id: str
    split: Split
    shard: int
    seq_len: int
    targets: tuple[TargetJob, ...]
    rollouts: RolloutJob | None = None


@dataclass
class ShardReport:
    """What was found in one shard. is_whole: every row could be read. sampled: of rollouts, when all could be read.

    doc_ids: 16 bytes each. read_rows: numbers of the rows that could be read; doc_ends: documents up to each of them.
    """

    split: Split
    shard: int
    tally: RowTally
    targets: dict[str, TargetReport]
    faults: Faults
    is_whole: bool = True
    sampled: SampledCounts | None = None
    doc_ids: bytearray = field(default_factory=bytearray)
    read_rows: array[int] = field(default_factory=lambda: array("q"))
    doc_ends: array[int] = field(default_factory=lambda: array("q"))

    def add(self, row: PackedRow, index: int) -> None:
        """Count a row that could be read."""
        self.tally.add(row)
        self.doc_ids += b"".join(row.doc_ids)
        self.read_rows.append(index)
        self.doc_ends.append(self.tally.documents)

    def unreadable(self, kind: str, file: str, row: int | None, message: str) -> None:
        """A fault that leaves something uncounted, here and in every target store."""
        self.faults.add(kind, file, row, message)
        for report in (self, *self.targets.values()):
            report.is_whole = False


def verify_shard(job: ShardJob) -> ShardReport:
    """Hash the files of a job, then read every row with its targets."""
    name, faults = job.entry.name, Faults()
    verify_file(job.folder, job.entry, "", faults)
    rollouts = None if job.rollouts is None else RolloutCheck(job.rollouts, faults)
    checks = [TargetCheck(target, faults, rollouts) for target in job.targets]
    report = ShardReport(
        split=job.split,
        shard=job.shard,
        tally=RowTally(job.seq_len),
        targets={check.job.slug: check.report for check in checks},
        faults=faults,
        sampled=None if rollouts is None else rollouts.counts,
    )
    try:
        tokens = TokenShard(
            job.folder,
            job.entry,
            dataset_id=job.dataset_id,
            split=job.split,
            shard=job.shard,
            seq_len=job.seq_len,
        )
    except FormatError as error:
        report.unreadable("shard", name, None, str(error))
        return report
    for index in range(tokens.num_rows):
        try:
            row = tokens.row(index)
        except FormatError as error:
            report.unreadable("row", name, index, str(error))
            continue
        report.add(row, index)
        _verify_padding(row, name, index, faults)
        if rollouts is None:
            _verify_documents(row, name, index, faults)
        else:
            rollouts.see(index, row)
        for check in checks:
            check.see(index, row)
    return report


def _verify_padding(row: PackedRow, name: str, index: int, faults: Faults) -> None:
    try:
        check_padding(row)
    except FormatError as error:
        faults.add("padding", name, index, str(error))


def _verify_documents(row: PackedRow, name: str, index: int, faults: Faults) -> None:
    for number, where in enumerate(row.documents()):
        try:
            check_document(row.tokens_T[where], row.spans_T[where])
        except FormatError as error:
            faults.add("document", name, index, f"document {number}: {error}")


def _open_stores(dataset: Dataset, faults: Faults) -> Iterator[TargetStore]:
    for slug in target_slugs(dataset.path):
        try:
            store = TargetStore.open(dataset, slug, check_sizes=False)
            if store.manifest.slug != slug:
                raise FormatError("the slug", got=store.manifest.slug, expected=slug)
            require_same_source(store.manifest, dataset.manifest)
            store_selection(store.manifest)
            yield store
        except VpmoeError as error:
            faults.add("target manifest", f"targets/{slug}/{MANIFEST_NAME}", None, str(error))


def _verify_unlisted(
    folder: Path, files: Mapping[Split, Sequence[FileEntry]], prefix: str, faults: Faults
) -> None:
    for split in SPLITS:
        listed = {entry.name for entry in files.get(split, ())}
        for path in sorted((folder / split).glob("*.arrow")):
            if (name := f"{split}/{path.name}") not in listed:
                faults.add("unlisted file", prefix + name, None, "the manifest does not list it")


def _shard_jobs(dataset: Dataset, stores: list[TargetStore]) -> list[ShardJob]:
    manifest = dataset.manifest
    return [
        ShardJob(
            folder=dataset.path,
            entry=entry,
            dataset_id=manifest.dataset_id,
            split=split,
            shard=shard,
            seq_len=manifest.seq_len,
            targets=tuple(target_job(store, split, shard) for store in stores),
            rollouts=_rollout_job(dataset, split, shard),
        )
        for split in SPLITS
        for shard, entry in enumerate(manifest.entries(split))
    ]


def _rollout_job(dataset: Dataset, split: Split, shard: int) -> RolloutJob | None:
    info = dataset.manifest.rollouts
    if info is None:
        return None
    entry = info.files[split][shard]
    return RolloutJob(dataset.path / PREFIX, entry, dataset.manifest.dataset_id, split, shard)


def shard_reports(jobs: Sequence[ShardJob], workers: int) -> list[ShardReport]:
    """The reports of all shards, in order."""
    rows = {(job.split, job.shard): job.entry.rows for job in jobs}
    reports = []
    with logs.progress("verify", sum(rows.values()), "rows") as bar:
        for report in run_jobs(verify_shard, jobs, workers=workers):
            bar.advance(rows[report.split, report.shard])
            reports.append(report)
    return sorted(reports, key=lambda report: (SPLITS.index(report.split), report.shard))


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


def verify_identities(reports: list[ShardReport], faults: Faults) -> None:
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
