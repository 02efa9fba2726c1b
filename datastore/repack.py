"""A finished dataset at another sequence length or packing; targets are carried over, nothing is scored again.

A unit is one train shard of the origin: its documents, in their order, become the train shard of the same number. The
valid split is packed together, as a build does. Targets follow once all rows are there (datastore/repack_targets.py).
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.config import override_config
from common.errors import ConfigError
from common.files import write_json
from datastore.assembly import (
    Provenance,
    commit_dataset,
    dataset_identity,
    finished_dataset,
    held_folder,
    identity_hash,
    open_work_folder,
    run_units,
    summed,
    write_valid,
)
from datastore.data_config import DataConfig
from datastore.manifest import DatasetManifest, TargetManifest
from datastore.packing import PackConfig, pack_documents
from datastore.reader import Dataset, TargetStore
from datastore.repack_targets import carry_targets
from datastore.shard import write_token_shard
from datastore.types import PackedRow, RenderedDoc
from datastore.unit import RowCounter, Unit, UnitRecord
from datastore.verify import target_slugs
from datastore.workers import run_jobs

LONGER = "longer_than_seq_len"


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackJob(Unit):
    """Everything that a worker needs to pack train shard `unit` of `origin` again. rows: of that shard."""

    origin: Dataset
    rows: int
    pack: PackConfig
    seq_len: int

    @property
    def source_rows(self) -> int:
        return self.rows


def repack_dataset(
    origin: Path,
    out: Path,
    *,
    seq_len: int | None = None,
    overrides: tuple[str, ...] = (),
    teachers: tuple[str, ...] = (),
    workers: int,
) -> tuple[DatasetManifest, list[TargetManifest]]:
    """Pack the documents of `origin` into rows of `seq_len` in `out`, go on with it, or leave a finished repack alone.

    seq_len: None keeps that of the origin. overrides: pack.key=value. teachers: whose targets to carry over, in any
    run on a finished repack too; all complete ones when empty. Documents longer than seq_len are left out and counted
    (`longer_than_seq_len`), never cut: their targets would not fit.

    Raises ConfigError (out is not apart from origin, another key than pack.*, rollouts), ResumeError (out holds another
    dataset, or another process is at work), FormatError (a damaged origin), SourceError (no document is short enough),
    AlignmentError (targets of other tokens), VpmoeError (disk full, a worker died).
    """
    origin, out = Path(origin).resolve(), Path(out).resolve()
    if out == origin or origin in out.parents or out in origin.parents:
        raise ConfigError(
            "repack reads one dataset and writes another", got=out, expected=f"apart from {origin}"
        )
    dataset = Dataset.open(origin)
    if dataset.manifest.rollouts is not None:
        raise ConfigError(
            f"{origin} is a dataset of rollouts, whose own columns a repack would lose",
            remedy="train on it at its seq_len",
        )
    config = _config(dataset.manifest, out, seq_len, overrides)
    stores = [TargetStore.open(dataset, slug) for slug in teachers or target_slugs(origin)]
    with held_folder(out, "repack"):
        manifest = _repack_rows(dataset, config, workers)
        repacked = Dataset.open(out)
        return manifest, [carry_targets(store, repacked, workers=workers) for store in stores]


def repack_unit(job: RepackJob) -> UnitRecord:
    """Pack the documents of one train shard again; the same job always writes the same bytes."""
    rejects: collections.Counter[str] = collections.Counter()
    documents = _documents(job.origin.shard_rows("train", job.unit), job.seq_len, rejects)
    counter = RowCounter()
    entry = write_token_shard(
        job.folder,
        counter.count(pack_documents(documents, seq_len=job.seq_len, config=job.pack)),
        dataset_id=job.dataset_id,
        split="train",
        shard=job.unit,
        seq_len=job.seq_len,
    )
    record = UnitRecord(
        dataset_id=job.dataset_id,
        unit=job.unit,
        source_rows=job.source_rows,
        train=entry,
        train_counts=counter.counts,
        work_files={},
        rejects=dict(rejects),
        truncated={},
    )
    write_json(job.record_path, record.resolved())
    return record


def _config(
    origin: DatasetManifest, out: Path, seq_len: int | None, overrides: tuple[str, ...]
) -> DataConfig:
    """The origin's config but for the length, the packing and the folder."""
    if strangers := [key for key in overrides if not key.startswith("pack.")]:
        raise ConfigError(
            "repack changes how documents are packed, not what they hold",
            got=strangers[0],
            expected="pack.key=value",
            remedy="build a dataset for anything else",
        )
    length = seq_len or origin.seq_len
    raw = {**origin.config, "seq_len": length, "out": str(out)}
    raw["max_doc_tokens"] = min(length, origin.config["max_doc_tokens"])
    return override_config(DataConfig, raw, overrides, f"repack of a dataset at {length} tokens")


def _repack_rows(origin: Dataset, config: DataConfig, workers: int) -> DatasetManifest:
    out, before = Path(config.out), origin.manifest
    provenance = Provenance(
        sources=before.sources,
        renderer_version=before.renderer_version,
        split_rule=before.split_rule,
        origin={
            "fingerprint": before.fingerprint,
            "dataset_id": before.dataset_id,
            "seq_len": before.seq_len,
        },
    )
    identity = dataset_identity(config.resolved(), provenance)
    if finished := finished_dataset(out, identity):
        return finished
    open_work_folder(out, identity)
    dataset_id = identity_hash(identity)
    jobs = [
        RepackJob(
            folder=out,
            dataset_id=dataset_id,
            unit=unit,
            origin=origin,
            rows=entry.rows,
            pack=config.pack,
            seq_len=config.seq_len,
        )
        for unit, entry in enumerate(before.entries("train"))
    ]
    records = run_units(
        lambda left: run_jobs(repack_unit, left, workers=workers),
        jobs,
        threads=workers,
        title="repacking",
    )
    too_long: collections.Counter[str] = collections.Counter()
    rows = (origin.row("valid", index) for index in range(origin.num_rows("valid")))
    valid = write_valid(config, dataset_id, _documents(rows, config.seq_len, too_long))
    return commit_dataset(
        config,
        identity,
        provenance,
        records,
        valid,
        rejects=summed([before.rejects, too_long, *(record.rejects for record in records)]),
        truncated=before.truncated,
        remedy="give a larger --seq-len",
    )


def _documents(
    rows: Iterable[PackedRow], seq_len: int, rejects: collections.Counter[str]
) -> Iterator[RenderedDoc]:
    """The documents of packed rows in their order; those that do not fit are counted in `rejects`."""
    for row in rows:
        labels = zip(row.doc_ids, row.languages, row.exercises, strict=True)
        for place, (doc_id, language, exercise) in zip(row.documents(), labels, strict=True):
            if place.stop - place.start > seq_len:
                rejects[LONGER] += 1
                continue
            yield RenderedDoc(
                doc_id=doc_id,
                tokens_T=row.tokens_T[place],
                spans_T=row.spans_T[place],
                language=language,
                exercise=exercise,
            )
