"""Targets of a dataset carried over to a repack of it, document by document, without scoring.

A train shard of the repack holds the documents of the origin's train shard of the same number, its valid shards those
of all valid shards. Rows are read in order on both sides, so only the targets of documents that wait for their row are
held: those of one packing window.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Config
from common.errors import FormatError, ResumeError
from common.files import (
    canonical_json,
    exclusive_lock,
    sha256_bytes,
    sha256_file,
    sweep_temporaries,
    write_json,
)
from common.logs import progress
from datastore.budget import BudgetSums, Losses, stated_losses, stored_budget
from datastore.codec import encode_blob
from datastore.manifest import (
    MANIFEST_NAME,
    QuarantinedDocument,
    TargetManifest,
    commit_manifest,
    load_target_manifest,
    target_folder,
)
from datastore.reader import Dataset, TargetStore
from datastore.score_manifest import gated, shard_facts
from datastore.shard import FileEntry, write_target_shard
from datastore.target import content_key
from datastore.types import SPLITS, DocTarget, PackedRow, Split
from datastore.unit import WORK
from datastore.workers import run_jobs

_log = logging.getLogger(__name__)
# Who a document is and what it says: its id, and the hash of its tokens.
_Key = tuple[bytes, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryJob:
    """The unit of work: one train shard of the repack, or all its valid shards.

    store: of the origin. dataset: the repack. losses: what storing cost the origin's targets (`stated_losses`).
    """

    store: TargetStore
    dataset: Dataset
    target_id: str
    split: Split
    shards: tuple[int, ...]
    losses: Losses

    @property
    def folder(self) -> Path:
        """Of the new targets."""
        return target_folder(self.dataset.path, self.store.manifest.slug)

    def record_path(self, shard: int) -> Path:
        return self.folder / WORK / f"{self.split}-{shard:05d}.json"


class CarriedShard(Config):
    """A finished target shard, as .work keeps it. documents, tokens: of those that have targets."""

    target_id: str
    entry: FileEntry
    documents: int
    tokens: int
    sums: BudgetSums
    quarantine: tuple[QuarantinedDocument, ...]


def carry_targets(store: TargetStore, dataset: Dataset, *, workers: int) -> TargetManifest:
    """Write the targets of `store`'s documents beside the rows of `dataset`, a repack of `store.dataset`.

    Goes on with unfinished work, leaves finished targets alone. Raises ResumeError (the folder holds other targets, or
    another process is at work), FormatError (damage, or a document that the origin lacks), AlignmentError.
    """
    before = store.manifest
    folder = target_folder(dataset.path, before.slug)
    identity = {
        "dataset": dataset.manifest.fingerprint,
        "origin": {"dataset": before.dataset_fingerprint, "target_id": before.target_id},
    }
    target_id = _target_id(identity)
    with exclusive_lock(folder / WORK / "lock", "repack"):
        if (folder / MANIFEST_NAME).exists():
            manifest = _finished_targets(dataset, before.slug, target_id)
            _clear_records(folder)
            return manifest
        _require_same_identity(folder, identity)
        for part in (folder, folder / WORK, *(folder / split for split in SPLITS)):
            sweep_temporaries(part)
        store.order.write(folder)
        jobs = _jobs(store, dataset, target_id)
        shards = _carry(dataset, jobs, workers)
        manifest = gated(dataset, _manifest(before, dataset, identity, shards))
        commit_manifest(folder, manifest)
        _clear_records(folder)
        return manifest


def carry_shards(job: CarryJob) -> list[CarriedShard]:
    """Write the target shards of a job; the same job always writes the same bytes."""
    stock = _Stock(_stored_documents(job))
    return [_carry_shard(job, shard, stock) for shard in job.shards]


def _target_id(identity: dict[str, Any]) -> str:
    return sha256_bytes(canonical_json(identity))


def _finished_targets(dataset: Dataset, slug: str, target_id: str) -> TargetManifest:
    manifest = load_target_manifest(dataset.path, slug)
    if manifest.target_id != target_id:
        raise _other_targets(target_folder(dataset.path, slug))
    _log.info("the targets of %s are finished: nothing to do", slug)
    return manifest


def _clear_records(folder: Path) -> None:
    """Remove the state of finished work but for the lock, which this process holds, and the identity."""
    for path in (folder / WORK).glob("*-*.json"):
        path.unlink()


def _require_same_identity(folder: Path, identity: dict[str, Any]) -> None:
    """The file that `vpmoe-data score` looks at too, so that neither goes on with the other's work."""
    path = folder / WORK / "identity.json"
    if not path.exists():
        write_json(path, identity)
    elif json.loads(path.read_bytes()) != identity:
        raise _other_targets(folder)


def _other_targets(folder: Path) -> ResumeError:
    return ResumeError(
        f"{folder} holds other targets than those of this repack",
        remedy="delete the folder, or repack into another one with --out",
    )


def _jobs(store: TargetStore, dataset: Dataset, target_id: str) -> list[CarryJob]:
    stated = store.manifest.shard_budgets
    for split in SPLITS:
        if len(stated.get(split, ())) != len(store.manifest.entries(split)):
            raise FormatError(
                f"the manifest of {store.path} states no error budget for each {split} shard",
                remedy="score it again",
            )
    make = functools.partial(CarryJob, store=store, dataset=dataset, target_id=target_id)
    jobs = [
        make(split="train", shards=(shard,), losses=stated_losses([stated["train"][shard]]))
        for shard in range(len(dataset.manifest.entries("train")))
    ]
    if valid := tuple(range(len(dataset.manifest.entries("valid")))):
        jobs.append(make(split="valid", shards=valid, losses=stated_losses(stated["valid"])))
    return jobs


def _carry(dataset: Dataset, jobs: list[CarryJob], workers: int) -> dict[str, CarriedShard]:
    """The finished shards by their file's name: those of an earlier run, verified, and the rest made now."""
    rows = {entry.name: entry.rows for split in SPLITS for entry in dataset.manifest.entries(split)}
    kept = [_finished_shards(job) for job in jobs]
    left = [job for job, shards in zip(jobs, kept, strict=True) if shards is None]
    found = {shard.entry.name: shard for shards in kept if shards for shard in shards}
    done = sum(rows[name] for name in found)
    with progress("carrying targets", sum(rows.values()), "rows", done) as bar:
        for shards in run_jobs(carry_shards, left, workers=workers):
            found |= {shard.entry.name: shard for shard in shards}
            bar.advance(sum(shard.entry.rows for shard in shards))
    return found


def _finished_shards(job: CarryJob) -> list[CarriedShard] | None:
    """The records of a job that an earlier run finished, if its files are still exactly those; else None."""
    try:
        records = [
            CarriedShard.model_validate_json(job.record_path(shard).read_bytes())
            for shard in job.shards
        ]
        is_whole = all(
            record.target_id == job.target_id
            and sha256_file(job.folder / record.entry.name) == record.entry.sha256
            for record in records
        )
    except (FileNotFoundError, ValueError):
        return None
    return records if is_whole else None


def _carry_shard(job: CarryJob, shard: int, stock: _Stock) -> CarriedShard:
    tally = _Tally(job, shard)
    entry = write_target_shard(
        job.folder,
        _blobs(job, shard, stock, tally),
        target_id=job.target_id,
        split=job.split,
        shard=shard,
    )
    record = CarriedShard(
        target_id=job.target_id,
        entry=entry,
        documents=tally.documents,
        tokens=tally.tokens,
        sums=tally.sums,
        quarantine=tuple(tally.quarantine),
    )
    write_json(job.record_path(shard), record.resolved())
    return record


def _blobs(
    job: CarryJob, shard: int, stock: _Stock, tally: _Tally
) -> Iterator[tuple[int, bytes | None]]:
    """(row hash, blob) of each row of a shard of the repack, in order."""
    for index, row in enumerate(job.dataset.shard_rows(job.split, shard)):
        documents = [stock.take(key) for key in _keys(row)]
        blob = None
        if any(documents):
            blob = encode_blob(documents, row, job.store.order)
        tally.add(index, row, documents, blob)
        yield row.row_hash, blob


class _Stock:
    """The targets of documents read from the origin and not yet taken."""

    def __init__(self, documents: Iterator[tuple[_Key, DocTarget | None]]) -> None:
        self._documents = documents
        self._waiting: dict[_Key, list[DocTarget | None]] = {}

    def take(self, key: _Key) -> DocTarget | None:
        """The target of a document, None where it was not scored. Raises FormatError when the origin lacks it."""
        while key not in self._waiting:
            try:
                other, target = next(self._documents)
            except StopIteration:
                raise FormatError(
                    f"document {key[0].hex()} of the repack is not in its origin",
                    remedy="`vpmoe-data verify` both datasets",
                ) from None
            self._waiting.setdefault(other, []).append(target)
        targets = self._waiting[key]
        if len(targets) == 1:
            del self._waiting[key]
        return targets.pop(0)


def _stored_documents(job: CarryJob) -> Iterator[tuple[_Key, DocTarget | None]]:
    """The origin's documents that fit a row of the repack, in order, with their targets."""
    store, split, seq_len = job.store, job.split, job.dataset.manifest.seq_len
    origin = store.dataset
    shards = job.shards if split == "train" else range(len(origin.manifest.entries(split)))
    first = sum(entry.rows for entry in origin.manifest.entries(split)[: shards[0]])
    rows = itertools.chain.from_iterable(origin.shard_rows(split, shard) for shard in shards)
    for index, row in enumerate(rows, first):
        targets = store.documents(split, index, row) or [None] * len(row.doc_ids)
        for place, key, target in zip(row.documents(), _keys(row), targets, strict=True):
            if place.stop - place.start <= seq_len:
                yield key, target


def _keys(row: PackedRow) -> list[_Key]:
    return [
        (doc_id, content_key(row.tokens_T[place]))
        for doc_id, place in zip(row.doc_ids, row.documents(), strict=True)
    ]


class _Tally:
    """Counts what a new target shard holds, and finds the new places of quarantined documents."""

    def __init__(self, job: CarryJob, shard: int) -> None:
        self._losses, self._place = job.losses, {"split": job.split, "shard": shard}
        self._quarantined = {d.doc_id: d for d in job.store.manifest.quarantine}
        self.documents = self.tokens = 0
        self.sums = BudgetSums()
        self.quarantine: list[QuarantinedDocument] = []

    def add(
        self, index: int, row: PackedRow, documents: list[DocTarget | None], blob: bytes | None
    ) -> None:
        """Row `index` of the shard."""
        for number, (place, document) in enumerate(zip(row.documents(), documents, strict=True)):
            if document is not None:
                self.documents += 1
                self.tokens += place.stop - place.start
            elif before := self._quarantined.get(row.doc_ids[number].hex()):
                place_now = self._place | {"row": index, "document": number}
                self.quarantine.append(before.model_copy(update=place_now))
        if blob is not None:
            self.sums = self.sums.merged(stored_budget(documents, blob, row, self._losses))


def _manifest(
    before: TargetManifest,
    dataset: Dataset,
    identity: dict[str, Any],
    shards: dict[str, CarriedShard],
) -> TargetManifest:
    """The origin's manifest with everything that another packing changes."""
    by_split = {
        split: [shards[entry.name] for entry in dataset.manifest.entries(split)] for split in SPLITS
    }
    return before.model_copy(
        update={
            "target_id": _target_id(identity),
            "dataset_fingerprint": identity["dataset"],
            "origin": identity["origin"],
            **shard_facts(by_split),
        }
    )
