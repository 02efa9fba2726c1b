"""How a dataset comes into its folder, whatever its rows are made of: train shards by unit, valid split, commit.

State of unfinished work (OUT/.work): plan.json, what is being made from what; unit-*.json, the finished units. The
same command continues it. The output depends on the plan alone, not on the workers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common import tokenizer
from common.config import flat_values
from common.errors import ResumeError, SourceError
from common.files import (
    canonical_json,
    exclusive_lock,
    full_disk_told,
    sha256_bytes,
    sweep_temporaries,
    write_json,
)
from common.logs import progress
from common.provenance import git_sha
from datastore.data_config import DataConfig
from datastore.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    SourceFile,
    TokenizerInfo,
    commit_manifest,
    dataset_fingerprint,
    load_dataset_manifest,
)
from datastore.packing import PACKING_VERSION, pack_documents
from datastore.shard import FORMAT_VERSION, FileEntry, write_token_shard
from datastore.types import SPLITS, PackedRow, RenderedDoc, Split
from datastore.unit import WORK, RowCounter, RowCounts, Unit, UnitRecord, finished_unit

AnyUnit = TypeVar("AnyUnit", bound=Unit)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the documents of a dataset come from. origin: of a repack, else None (docs/format.md, "Repack")."""

    sources: tuple[SourceFile, ...]
    renderer_version: str
    split_rule: dict[str, Any]
    origin: dict[str, Any] | None = None


@contextlib.contextmanager
def held_folder(out: Path, purpose: str) -> Iterator[None]:
    """Hold the lock of a dataset's folder for the block; a full disk becomes a clear error.

    Raises ResumeError when another process holds it.
    """
    again = "free space and run the same command again: finished shards are kept"
    with full_disk_told(out, again), exclusive_lock(out / WORK / "lock", purpose):
        yield


def dataset_identity(config: dict[str, Any], provenance: Provenance) -> dict[str, Any]:
    """What determines every row of a dataset, as plain values; its sha256 is the dataset_id (docs/format.md).

    config: a resolved DataConfig. Where the input and the output lie does not matter, only what the input holds.
    """
    shaping = {key: value for key, value in config.items() if key not in ("source", "out")}
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.RANKS_SHA256,
        "renderer_version": provenance.renderer_version,
        "packing_version": PACKING_VERSION,
        "config": shaping,
        "sources": [[source.bytes, source.sha256] for source in provenance.sources],
        "origin": provenance.origin,
    }


def identity_hash(identity: dict[str, Any]) -> str:
    """The dataset_id of an identity."""
    return sha256_bytes(canonical_json(identity))


def finished_dataset(out: Path, identity: dict[str, Any]) -> DatasetManifest | None:
    """The manifest of the dataset in `out`, None when it has none yet. Raises ResumeError when it is another one."""
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = load_dataset_manifest(out)
    if manifest.dataset_id != identity_hash(identity):
        before = Provenance(
            sources=manifest.sources,
            renderer_version=manifest.renderer_version,
            split_rule=manifest.split_rule,
            origin=manifest.origin,
        )
        raise _other_dataset(out, dataset_identity(manifest.config, before), identity)
    _clear_work_folder(out)
    _log.info("%s is finished (fingerprint %s): nothing to do", out, manifest.fingerprint[:16])
    return manifest


def open_work_folder(out: Path, identity: dict[str, Any]) -> None:
    """Take up the unfinished work in `out`, or start in an empty place. Raises ResumeError for anything else."""
    plan = out / WORK / "plan.json"
    if plan.exists():
        before = json.loads(plan.read_bytes())
        if before != identity:
            raise _other_dataset(out, before, identity)
        for folder in (out, out / WORK, *(out / split for split in SPLITS)):
            sweep_temporaries(folder)
    elif strangers := [path for split in SPLITS for path in (out / split).glob("*.arrow")]:
        raise ResumeError(
            f"{out} holds shards but neither a manifest nor a plan, e.g. {strangers[0]}",
            remedy="delete the folder, or choose another one",
        )
    else:
        write_json(plan, identity)


def run_units(
    run: Callable[[Sequence[AnyUnit]], Iterable[UnitRecord]],
    jobs: Sequence[AnyUnit],
    *,
    threads: int,
    title: str,
) -> list[UnitRecord]:
    """The records of all units in order: those an earlier run finished, verified, and the rest made by `run` now."""
    begun = [job for job in jobs if job.record_path.exists()]
    with ThreadPoolExecutor(threads) as pool:
        records = {record.unit: record for record in pool.map(finished_unit, begun) if record}
    if begun:
        _log.info("going on: %d of %d units are finished", len(records), len(jobs))
    total = sum(job.source_rows for job in jobs)
    done = sum(record.source_rows for record in records.values())
    left = [job for job in jobs if job.unit not in records]
    with progress(title, total, "rows", done) as bar:
        for record in run(left):
            records[record.unit] = record
            bar.advance(record.source_rows)
    return [records[job.unit] for job in jobs]


def write_valid(
    config: DataConfig, dataset_id: str, documents: Iterable[RenderedDoc]
) -> tuple[list[FileEntry], RowCounts]:
    """Pack the valid documents of all units together, in their order, into shards of `shard.valid_rows`."""
    counter = RowCounter()
    rows = counter.count(pack_documents(documents, seq_len=config.seq_len, config=config.pack))
    entries = [
        write_token_shard(
            Path(config.out),
            shard_rows,
            dataset_id=dataset_id,
            split="valid",
            shard=shard,
            seq_len=config.seq_len,
        )
        for shard, shard_rows in enumerate(_chunks(rows, config.shard.valid_rows))
    ]
    return entries, counter.counts


def commit_dataset(
    config: DataConfig,
    identity: dict[str, Any],
    provenance: Provenance,
    records: list[UnitRecord],
    valid: tuple[list[FileEntry], RowCounts],
    *,
    rejects: dict[str, int],
    truncated: dict[str, int],
    remedy: str,
) -> DatasetManifest:
    """Write the manifest; then the dataset exists. Raises SourceError, with `remedy`, when it holds no document."""
    out, dataset_id = Path(config.out), identity_hash(identity)
    valid_files, valid_counts = valid
    train_counts = sum((record.train_counts for record in records), RowCounts())
    if train_counts.rows + valid_counts.rows == 0:
        raise SourceError(
            "not one source row gives a document",
            got=", ".join(f"{reason} {n:,}" for reason, n in rejects.items()) or "no rows at all",
            remedy=remedy,
        )
    # A unit without train rows keeps its empty shard, as shards are numbered without gaps; a whole split does not.
    train_files = [record.train for record in records] if train_counts.rows else []
    for record in records if not train_files else []:
        (out / record.train.name).unlink(missing_ok=True)
    files: dict[Split, tuple[FileEntry, ...]] = {
        "train": tuple(train_files),
        "valid": tuple(valid_files),
    }
    settings = {key: value for key, value in config.resolved().items() if key != "out"}
    manifest = DatasetManifest(
        format_version=FORMAT_VERSION,
        dataset_id=dataset_id,
        fingerprint=dataset_fingerprint(dataset_id, config.seq_len, files),
        seq_len=config.seq_len,
        git_sha=git_sha(),
        config=settings,
        config_hash=sha256_bytes(canonical_json(settings)),
        tokenizer=TokenizerInfo(),
        renderer_version=provenance.renderer_version,
        sources=provenance.sources,
        split_rule=provenance.split_rule,
        counts={
            "train": train_counts.of_split(config.seq_len),
            "valid": valid_counts.of_split(config.seq_len),
        },
        rejects=rejects,
        truncated=truncated,
        files=files,
        origin=provenance.origin,
    )
    commit_manifest(out, manifest)
    _clear_work_folder(out)
    return manifest


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts by reason of all together, reasons in order."""
    counts = list(counts)
    keys = sorted({key for count in counts for key in count})
    return {key: sum(count.get(key, 0) for count in counts) for key in keys}


def _chunks(rows: Iterator[PackedRow], size: int) -> Iterator[Iterator[PackedRow]]:
    """Runs of up to `size` rows; each must be used up before the next is asked for."""
    for first in rows:
        yield itertools.chain([first], itertools.islice(rows, size - 1))


def _clear_work_folder(out: Path) -> None:
    """Remove the state of the stage but the lock, which this process holds."""
    for path in (out / WORK).iterdir():
        if path.name != "lock":
            path.unlink()


def _other_dataset(out: Path, before: dict[str, Any], now: dict[str, Any]) -> ResumeError:
    old, new = (
        {key: json.dumps(value, ensure_ascii=False) for key, value in flat_values(values).items()}
        for values in (before, now)
    )
    differences = [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    shown = "; ".join(differences[:8]) + (
        f"; and {len(differences) - 8} more" * (len(differences) > 8)
    )
    return ResumeError(
        f"{out} belongs to another dataset ({shown})",
        remedy="undo the change, choose another folder (out=... or --out), or delete this one",
    )
