"""The targets' part of `vpmoe-data verify`: one shard beside its token shard, then what the whole store states."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import parse_config
from common.errors import AlignmentError, FormatError
from datastore.budget import Budget
from datastore.checks import TargetTally, sum_differences
from datastore.codec import decode_blob
from datastore.faults import Faults, verify_file
from datastore.id_order import IdOrder
from datastore.manifest import MANIFEST_NAME, QuarantinedDocument, TargetManifest
from datastore.reader import TargetStore
from datastore.selection import Selection
from datastore.shard import FileEntry, TargetShard, shard_name
from datastore.target import row_target
from datastore.types import PackedRow, Split
from datastore.verify_rollouts import LogprobCheck, RolloutCheck


@dataclass(frozen=True)
class TargetJob:
    """The target shard of one teacher beside a token shard. quarantine: of this shard.

    is_repacked: the fraction of the selection is of rows that were packed otherwise. logprobs: the shard of exact
    ones, of rollouts alone.
    """

    slug: str
    folder: Path
    entry: FileEntry
    split: Split
    shard: int
    target_id: str
    threshold: float
    id_order_sha256: str
    selection: Selection
    quarantine: tuple[QuarantinedDocument, ...]
    is_repacked: bool
    logprobs: FileEntry | None = None


@dataclass
class TargetReport:
    """What was recounted of one target shard. is_whole: every target could be read, so the sums mean something."""

    tally: TargetTally
    is_whole: bool = True


def target_prefix(slug: str) -> str:
    """What leads the names of a store's files in a fault."""
    return f"targets/{slug}/"


def store_selection(manifest: TargetManifest) -> Selection:
    """What was to be scored. Raises ConfigError when the manifest states no selection."""
    return parse_config(Selection, manifest.selection, "the selection")


def target_job(store: TargetStore, split: Split, shard: int) -> TargetJob:
    """All that a worker needs for one target shard."""
    manifest = store.manifest
    return TargetJob(
        slug=manifest.slug,
        folder=store.path,
        entry=manifest.entries(split)[shard],
        split=split,
        shard=shard,
        target_id=manifest.target_id,
        threshold=manifest.threshold,
        id_order_sha256=manifest.id_order_sha256,
        selection=store_selection(manifest),
        quarantine=tuple(q for q in manifest.quarantine if (q.split, q.shard) == (split, shard)),
        is_repacked=manifest.origin is not None,
        logprobs=manifest.logprobs[split][shard] if manifest.logprobs is not None else None,
    )


class TargetCheck:
    """One target shard, read row by row beside the rows of its token shard. report: what was counted so far."""

    def __init__(
        self, job: TargetJob, faults: Faults, rollouts: RolloutCheck | None = None
    ) -> None:
        self.job, self._faults = job, faults
        self.report = TargetReport(TargetTally(job.threshold))
        self._file = target_prefix(job.slug) + job.entry.name
        self._quarantine: dict[int, dict[int, QuarantinedDocument]] = {}
        for document in job.quarantine:
            self._quarantine.setdefault(document.row, {})[document.document] = document
        verify_file(job.folder, job.entry, target_prefix(job.slug), faults)
        place = {"target_id": job.target_id, "split": job.split, "shard": job.shard}
        self._logprobs = None
        if job.logprobs is not None and rollouts is not None:
            prefix = target_prefix(job.slug)
            self._logprobs = LogprobCheck(
                job.folder, job.logprobs, prefix, rollouts, faults, **place
            )
        self._shard: TargetShard | None = None
        try:
            self._shard = TargetShard(job.folder, job.entry, **place)
        except FormatError as error:
            self._unreadable("target shard", None, str(error))

    def see(self, index: int, row: PackedRow) -> None:
        """Read and count the targets of row `index`; hold its documents against selection and quarantine."""
        if self._shard is None:
            return
        try:
            is_scored_D = self._scored(self._shard, index, row)
        except (FormatError, AlignmentError) as error:
            kind = "targets" if isinstance(error, FormatError) else "alignment of targets"
            self._unreadable(kind, index, str(error))
            return
        for message in _choice_faults(self.job, row, is_scored_D, self._quarantine.get(index, {})):
            self._faults.add("selection", self._file, index, message)
        for document in self._quarantine.get(index, {}).values():
            for message in _quarantine_faults(document, row, is_scored_D):
                self._faults.add("quarantine", self._file, index, message)

    def _scored(self, shard: TargetShard, index: int, row: PackedRow) -> np.ndarray:
        """Which documents of the row are scored: bool [D]. Counts them."""
        blob = shard.blob(index, row.row_hash)
        if blob is None:
            return np.zeros(len(row.doc_ids), dtype=bool)
        documents = decode_blob(blob, row, _id_order(self.job.folder, self.job.id_order_sha256))
        sparse = row_target(documents, row)
        if sparse.threshold != self.job.threshold:
            raise FormatError("threshold", got=sparse.threshold, expected=self.job.threshold)
        self.report.tally.add(self.job.split, row, documents, sparse, blob)
        if self._logprobs is not None:
            self._logprobs.see(index, documents)
        return np.array([document is not None for document in documents])

    def _unreadable(self, kind: str, index: int | None, message: str) -> None:
        self._faults.add(kind, self._file, index, message)
        self.report.is_whole = False


@functools.lru_cache(maxsize=4)
def _id_order(folder: Path, sha256: str) -> IdOrder:
    """One read a worker."""
    return IdOrder.read(folder, sha256)


def _choice_faults(
    job: TargetJob,
    row: PackedRow,
    is_scored_D: np.ndarray,
    quarantined: Mapping[int, QuarantinedDocument],
) -> Iterator[str]:
    """Documents that are scored or quarantined and were not selected, and selected ones that are neither."""
    # The rows of a repack are not those whose hashes chose what was scored: there only the filters can be told.
    chosen_D = job.selection.passing(row) if job.is_repacked else job.selection.documents(row)
    for number in np.flatnonzero(is_scored_D & ~chosen_D):
        yield f"document {number} is scored and was not selected"
    for number in quarantined:
        if number in np.flatnonzero(~chosen_D):
            yield f"document {number} is quarantined and was not selected"
    if job.is_repacked and job.selection.fraction < 1:
        return
    for number in np.flatnonzero(~is_scored_D & chosen_D):
        if number not in quarantined:
            yield f"document {number} was selected and is not scored"


def _quarantine_faults(
    document: QuarantinedDocument, row: PackedRow, is_scored_D: np.ndarray
) -> Iterator[str]:
    if not 0 <= document.document < len(row.doc_ids):
        yield f"document {document.document} is quarantined and the row has {len(row.doc_ids)}"
    elif (doc_id := row.doc_ids[document.document].hex()) != document.doc_id:
        yield f"document {document.document} is {doc_id}, quarantined as {document.doc_id}"
    elif is_scored_D[document.document]:
        yield f"document {document.document} is quarantined and scored"


def verify_store(
    manifest: TargetManifest, reports: Mapping[Split, list[TargetReport]], faults: Faults
) -> None:
    """What the manifest states of the whole store, against the reports of its shards in order."""
    file = target_prefix(manifest.slug) + MANIFEST_NAME
    for document in manifest.quarantine:
        shards = manifest.entries(document.split)
        if not (
            0 <= document.shard < len(shards) and 0 <= document.row < shards[document.shard].rows
        ):
            where = f"{document.split} shard {document.shard} row {document.row}"
            faults.add("quarantine", file, None, f"{where} is quarantined and does not exist")
    everything = list(itertools.chain.from_iterable(reports.values()))
    if not all(report.is_whole for report in everything):
        return  # the sums of a part say nothing
    tally = TargetTally(manifest.threshold)
    for report in everything:
        tally.merge(report.tally)
    for split, stated in manifest.counts.items():
        found = tally.by_split.get(split, {"documents": 0, "tokens": 0})
        if stated != found:
            faults.add("target counts", file, None, f"{split}: manifest {stated}, stored {found}")
    try:
        whole = Budget.model_validate(manifest.budget)
        of_shards = {
            split: [Budget.model_validate(values) for values in budgets]
            for split, budgets in manifest.shard_budgets.items()
        }
    except ValueError as error:
        faults.add("budget", file, None, str(error))
        return
    for difference in tally.differences(whole):
        faults.add("budget", file, None, difference)
    if of_shards:
        _verify_shard_budgets(of_shards, whole, reports, file, faults)


def _verify_shard_budgets(
    budgets: Mapping[Split, list[Budget]],
    whole: Budget,
    reports: Mapping[Split, list[TargetReport]],
    file: str,
    faults: Faults,
) -> None:
    for split, of_split in reports.items():
        stated = budgets.get(split, [])
        if len(stated) != len(of_split):
            message = f"{split}: {len(stated)} shard budgets for {len(of_split)} shards"
            faults.add("shard budgets", file, None, message)
            return
        for shard, (budget, report) in enumerate(zip(stated, of_split, strict=True)):
            for difference in report.tally.differences(budget):
                faults.add("shard budgets", file, None, f"{shard_name(split, shard)}: {difference}")
    for difference in sum_differences(itertools.chain.from_iterable(budgets.values()), whole):
        faults.add("shard budgets", file, None, f"their sum: {difference}")
