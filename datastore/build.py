"""SYNTH to a dataset: units to shards in worker processes, the valid split last, the manifest at the very end.

State of an unfinished build (OUT/.work): plan.json, what is being built from what; unit-*.json, the finished units.
The same command continues it. The output depends on the sources and the config alone, not on the workers.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from common import tokenizer
from common.config import Config
from common.errors import ResumeError, SourceError, VpmoeError
from common.files import (
    canonical_json,
    exclusive_lock,
    sha256_bytes,
    sweep_temporaries,
    write_json,
)
from common.logs import progress
from common.provenance import git_sha
from datastore.harmony import RENDERER_VERSION, RenderConfig
from datastore.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    SourceFile,
    TokenizerInfo,
    commit_manifest,
    dataset_fingerprint,
    load_dataset_manifest,
)
from datastore.packing import PACKING_VERSION, PackConfig, pack_documents
from datastore.repeats import repeated_rows
from datastore.shard import FORMAT_VERSION, FileEntry, write_token_shard
from datastore.source import SourceConfig, SourcePath, cut_units, inspect_source, locate_sources
from datastore.split import SPLIT_RULE, SplitConfig, split_bound
from datastore.types import SPLITS, PackedRow, Split
from datastore.unit import (
    WORK,
    RowCounter,
    RowCounts,
    UnitJob,
    UnitRecord,
    build_unit,
    finished_unit,
    read_fragment,
)
from datastore.workers import run_jobs

_log = logging.getLogger(__name__)


class ShardConfig(Config):
    """source_rows: rows of the input that make one train shard. valid_rows: packed rows of one valid shard."""

    source_rows: int = Field(default=65_536, ge=1)
    valid_rows: int = Field(default=16_384, ge=1)


class DataConfig(Config):
    """How a dataset is made. max_doc_tokens is seq_len unless given; out is the dataset's folder."""

    source: SourceConfig
    render: RenderConfig = RenderConfig()
    split: SplitConfig = SplitConfig()
    pack: PackConfig = PackConfig()
    shard: ShardConfig = ShardConfig()
    seq_len: int = Field(default=2048, ge=2)
    max_doc_tokens: int = Field(ge=2)
    out: str

    @model_validator(mode="before")
    @classmethod
    def _documents_fill_rows(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("max_doc_tokens") is None:
            return {
                **raw,
                "max_doc_tokens": raw.get("seq_len", cls.model_fields["seq_len"].default),
            }
        return raw

    @model_validator(mode="after")
    def _documents_fit_rows(self) -> DataConfig:
        if self.max_doc_tokens > self.seq_len:
            raise ValueError(
                f"max_doc_tokens {self.max_doc_tokens} is more than seq_len {self.seq_len}: "
                "a document is never split across rows"
            )
        return self


def build_dataset(config: DataConfig, *, workers: int) -> DatasetManifest:
    """Build the dataset that `config` describes, go on with it, or do nothing when it is finished.

    Raises SourceError (no usable input), ResumeError (config.out holds another dataset, or another builder is at
    work), VpmoeError (disk full, a worker died); what is finished by then is kept for the next run.
    """
    sources = locate_sources(config.source)
    out = Path(config.out)
    with _explained_disk_errors(out), exclusive_lock(out / WORK / "lock", "build"):
        files = _inspect_sources(sources, workers)
        identity = dataset_identity(config.resolved(), files)
        if (out / MANIFEST_NAME).exists():
            return _finished_dataset(out, identity)
        dataset_id = sha256_bytes(canonical_json(identity))
        _open_work_folder(out, identity)
        jobs = _unit_jobs(config, out, dataset_id, sources, files, workers)
        records = _build_units(jobs, workers)
        return _finish(config, files, dataset_id, jobs, records)


def dataset_identity(config: dict[str, Any], sources: list[SourceFile]) -> dict[str, Any]:
    """What determines every row of a dataset, as plain values; its sha256 is the dataset_id (docs/format.md).

    config: a resolved DataConfig. Where the input and the output lie does not matter, only what the input holds.
    """
    shaping = {key: value for key, value in config.items() if key not in ("source", "out")}
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.RANKS_SHA256,
        "renderer_version": RENDERER_VERSION,
        "packing_version": PACKING_VERSION,
        "config": shaping,
        "sources": [[source.bytes, source.sha256] for source in sources],
    }


def _inspect_sources(sources: list[SourcePath], workers: int) -> list[SourceFile]:
    """Sizes, hashes and rows of the sources, in their order. In threads: hashing releases the interpreter."""
    found = []
    total = sum(source.path.stat().st_size for source in sources)
    with progress("hashing sources", total, "B") as bar, ThreadPoolExecutor(workers) as pool:
        for file in pool.map(inspect_source, sources):
            found.append(file)
            bar.advance(file.bytes)
    return found


def _finished_dataset(out: Path, identity: dict[str, Any]) -> DatasetManifest:
    """The manifest of a finished dataset, if it is the one asked for."""
    manifest = load_dataset_manifest(out)
    if manifest.dataset_id != sha256_bytes(canonical_json(identity)):
        before = dataset_identity(manifest.config, list(manifest.sources))
        raise _other_dataset(out, before, identity)
    _clear_work_folder(out)
    _log.info("%s is finished (fingerprint %s): nothing to do", out, manifest.fingerprint[:16])
    return manifest


def _open_work_folder(out: Path, identity: dict[str, Any]) -> None:
    """Take up the unfinished build in `out`, or start one in an empty place."""
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
            remedy="delete the folder, or build into another one with out=...",
        )
    else:
        write_json(plan, identity)


def _unit_jobs(
    config: DataConfig,
    out: Path,
    dataset_id: str,
    sources: list[SourcePath],
    files: list[SourceFile],
    workers: int,
) -> list[UnitJob]:
    paths, rows = [source.path for source in sources], [file.rows for file in files]
    repeats_R = repeated_rows(paths, rows, workers)
    unit_rows = config.shard.source_rows
    return [
        UnitJob(
            folder=out,
            dataset_id=dataset_id,
            unit=unit,
            segments=segments,
            repeats=frozenset(
                (repeats_R[repeats_R // unit_rows == unit] - unit * unit_rows).tolist()
            ),
            render=config.render,
            pack=config.pack,
            valid_bound=split_bound(config.split.valid_fraction),
            seq_len=config.seq_len,
            max_doc_tokens=config.max_doc_tokens,
        )
        for unit, segments in enumerate(cut_units(paths, rows, unit_rows))
    ]


def _build_units(jobs: list[UnitJob], workers: int) -> list[UnitRecord]:
    """The records of all units in order: those an earlier run finished, verified, and the rest built now."""
    begun = [job for job in jobs if job.record_path.exists()]
    with ThreadPoolExecutor(workers) as pool:
        records = {record.unit: record for record in pool.map(finished_unit, begun) if record}
    if begun:
        _log.info("going on: %d of %d units are finished", len(records), len(jobs))
    total = sum(segment.rows for job in jobs for segment in job.segments)
    done = sum(record.source_rows for record in records.values())
    left = [job for job in jobs if job.unit not in records]
    with progress("building", total, "rows", done) as bar:
        for record in run_jobs(build_unit, left, workers=workers):
            records[record.unit] = record
            bar.advance(record.source_rows)
    return [records[job.unit] for job in jobs]


def _finish(
    config: DataConfig,
    sources: list[SourceFile],
    dataset_id: str,
    jobs: list[UnitJob],
    records: list[UnitRecord],
) -> DatasetManifest:
    """Write the valid split and the manifest; then the dataset exists."""
    out = Path(config.out)
    rejects = _summed([record.rejects for record in records])
    train_counts = sum((record.train_counts for record in records), RowCounts())
    valid_files, valid_counts = _write_valid(config, dataset_id, jobs)
    if train_counts.rows + valid_counts.rows == 0:
        raise SourceError(
            "not one source row gives a document",
            got=", ".join(f"{reason} {n:,}" for reason, n in rejects.items()) or "no rows at all",
            remedy="check the columns of the source, render.* and max_doc_tokens",
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
        renderer_version=RENDERER_VERSION,
        sources=tuple(sources),
        split_rule={"rule": SPLIT_RULE, "valid_fraction": config.split.valid_fraction},
        counts={
            "train": train_counts.of_split(config.seq_len),
            "valid": valid_counts.of_split(config.seq_len),
        },
        rejects=rejects,
        truncated=_summed([record.truncated for record in records]),
        files=files,
    )
    commit_manifest(out, manifest)
    _clear_work_folder(out)
    return manifest


def _write_valid(
    config: DataConfig, dataset_id: str, jobs: list[UnitJob]
) -> tuple[list[FileEntry], RowCounts]:
    """Pack the valid documents of all units together, in unit order, into shards of `shard.valid_rows`."""
    documents = itertools.chain.from_iterable(read_fragment(job.fragment_path) for job in jobs)
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


def _chunks(rows: Iterator[PackedRow], size: int) -> Iterator[Iterator[PackedRow]]:
    """Runs of up to `size` rows; each must be used up before the next is asked for."""
    for first in rows:
        yield itertools.chain([first], itertools.islice(rows, size - 1))


def _summed(counts: list[dict[str, int]]) -> dict[str, int]:
    keys = sorted({key for count in counts for key in count})
    return {key: sum(count.get(key, 0) for count in counts) for key in keys}


def _clear_work_folder(out: Path) -> None:
    """Remove the state of the build but the lock, which this process holds."""
    for path in (out / WORK).iterdir():
        if path.name != "lock":
            path.unlink()


def _other_dataset(out: Path, before: dict[str, Any], now: dict[str, Any]) -> ResumeError:
    old, new = _flat(before), _flat(now)
    differences = [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    shown = "; ".join(differences[:8]) + (
        f"; and {len(differences) - 8} more" * (len(differences) > 8)
    )
    return ResumeError(
        f"{out} belongs to another build ({shown})",
        remedy="undo the change, build into another folder with out=..., or delete this one",
    )


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and lists as {"render.reasoning": "high", "sources.0.1": "..."}."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        flat: dict[str, str] = {}
        for key, value in items:
            flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: json.dumps(values, ensure_ascii=False)}


@contextlib.contextmanager
def _explained_disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise VpmoeError(
            f"the disk that holds {out} is full",
            got=error.strerror,
            remedy="free space and run the same command again: finished shards are kept",
        ) from None
