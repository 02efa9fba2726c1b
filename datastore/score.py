"""The score stage: the selected documents of a dataset through the teacher, one target shard beside each token shard.

Resumable at any moment: a finished shard has a record in targets/<name>/.work and is kept once its sha256 is verified;
of an unfinished one the finished pieces are kept (score_pieces).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import logs
from common.config import flat_values, parse_config
from common.errors import EngineError, ResumeError
from common.files import (
    canonical_json,
    exclusive_lock,
    sha256_bytes,
    sha256_file,
    sweep_temporaries,
    write_bytes,
    write_json,
)
from common.provenance import package_versions
from datastore.codec import CODEC_VERSION
from datastore.id_order import IdOrder, count_order
from datastore.manifest import TargetManifest, commit_manifest, target_folder
from datastore.prompt import document_prefix, require_fitting
from datastore.reader import Dataset
from datastore.score_fleet import Fleet, LocalRoom, Room, local_engines
from datastore.score_job import ScoreRun, ShardJob, ShardRecord, require_few_quarantined
from datastore.score_manifest import target_manifest
from datastore.score_pieces import forgive
from datastore.score_worker import VERSIONED, StartEngine, start_engine
from datastore.selection import Selection, require_match
from datastore.teacher import TeacherConfig, local_model, weights_identity
from datastore.types import SPLITS

_LOG = logging.getLogger(__name__)
_EVERYTHING = Selection()
OpenRoom = Callable[[], contextlib.AbstractContextManager[tuple[Room, int]]]


def score_dataset(
    dataset: Path,
    teacher: TeacherConfig,
    *,
    selection: Selection = _EVERYTHING,
    ray: str | None = None,
    engines: int | None = None,
    start: StartEngine = start_engine,
) -> TargetManifest:
    """Score both splits of a dataset into DATASET/targets/<teacher.name>; returns the committed manifest.

    ray: the address of a Ray cluster whose machines see the same folders; None: processes of this machine. engines: at
    most so many; None: as many as there is room for. start: what starts an engine. Processes start by spawn, so the
    caller's main module must be importable. A complete store of the same teacher is verified and kept.

    Raises ConfigError (documents longer than the engine takes, no model, nothing selected, no room for an engine),
    ResumeError (the folder belongs to another teacher or selection, or is being written), EngineError (no engine is
    left, too many documents fail), AlignmentError (the gate, the limits), FormatError (a damaged dataset).
    """
    opened = Dataset.open(dataset.resolve())
    require_fitting(opened.manifest, teacher, document_prefix(opened.manifest, teacher))
    require_match(selection, opened.rows())
    weights = weights_identity(teacher, local_model(teacher))
    shaping = {
        "dataset": opened.manifest.fingerprint,
        "codec_version": CODEC_VERSION,
        "teacher": {**teacher.shaping(), **weights},
        "selection": selection.resolved(),
    }
    order = count_order(opened)
    run = ScoreRun(
        dataset=opened.path,
        folder=target_folder(opened.path, teacher.name),
        teacher=_with_absolute_paths(teacher),
        weights=weights,
        versions=package_versions(VERSIONED),
        selection=selection,
        target_id=sha256_bytes(canonical_json(shaping)),
        order_sha256=order.sha256,
    )
    with exclusive_lock(run.work / "lock", "score"):
        identity = {**shaping, "versions": run.versions}
        _require_same_identity(run.work / "identity.json", identity, teacher.name)
        manifest = _Stage(opened, run, order).score(lambda: _room(run, start, ray, engines))
        manifest = manifest.model_copy(update={"teacher": teacher.resolved()})
        commit_manifest(run.folder, manifest)
    return manifest


def _with_absolute_paths(teacher: TeacherConfig) -> TeacherConfig:
    """The same for a worker whose working directory is another."""
    paths = {"canary": teacher.canary and str(Path(teacher.canary).resolve())}
    if teacher.revision is None:
        paths["model"] = str(Path(teacher.model).resolve())
    return teacher.model_copy(update=paths)


def _require_same_identity(path: Path, identity: dict[str, Any], name: str) -> None:
    if not path.exists():
        write_json(path, identity)
        return
    found = flat_values(json.loads(path.read_bytes()))
    wanted = flat_values(identity)
    changed = [
        f"{key}: {found.get(key)} -> {wanted.get(key)}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if changed:
        raise ResumeError(
            f"{path.parent.parent} holds targets of another dataset, teacher, selection or version: "
            + ", ".join(changed),
            remedy=f"restore those values, give another name (name={name}-2), or delete the folder",
        )


@dataclass
class _Stage:
    """One run of the stage, under the folder's lock."""

    dataset: Dataset
    run: ScoreRun
    order: IdOrder

    def score(self, room: OpenRoom) -> TargetManifest:
        jobs = [
            ShardJob(run=self.run, split=split, shard=shard)
            for split in SPLITS
            for shard in range(len(self.dataset.manifest.entries(split)))
        ]
        for folder in (self.run.folder, self.run.work, *(self.run.folder / s for s in SPLITS)):
            sweep_temporaries(folder)
        self.order.write(self.run.folder)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = zip(jobs, pool.map(_finished, jobs), strict=True)
            records = {job.name: record for job, record in found if record}
        self._write_timings(records)
        missing = [job for job in jobs if job.name not in records]
        if missing:
            self._score_missing(missing, records, room)
        manifest = target_manifest(self.dataset, self.run, [(j, records[j.name]) for j in jobs])
        for job in jobs:
            shutil.rmtree(job.folder, ignore_errors=True)
        return manifest

    def _score_missing(
        self, missing: list[ShardJob], records: dict[str, ShardRecord], open_room: OpenRoom
    ) -> None:
        """Score what is missing; `records` and the files of this run grow with each finished shard."""
        total = sum(counts.tokens for counts in self.dataset.manifest.counts.values())
        done = sum(record.row_tokens for record in records.values())
        name, left = self.run.teacher.name, total - done
        _LOG.info("teacher %s: %s of %s tokens left", name, f"{left:,}", f"{total:,}")
        try:
            with (
                logs.progress("score", total, "tokens", done) as bar,
                open_room() as (room, size),
            ):
                for record in Fleet(room, size, missing, self._join).run(bar, done):
                    records[record.name] = record
                    self._write_timings(records)
                    self._require_few_quarantined(list(records.values()))
        except EngineError:
            raise  # the engines died by themselves
        except BaseException:
            for job in missing:
                forgive(job)
            raise

    def _require_few_quarantined(self, records: list[ShardRecord]) -> None:
        quarantined = sum(len(record.quarantine) for record in records)
        scored = sum(record.documents for record in records)
        require_few_quarantined(quarantined, quarantined + scored, str(self.run.folder))

    def _join(self, report: dict[str, Any]) -> None:
        """An engine has started: what the manifest says of engines holds for all of them."""
        path = self.run.work / "engine.json"
        if not path.exists():
            write_json(path, report)
            return
        found = json.loads(path.read_bytes())
        if (mine := report["engine"]["device"]) not in found["engine"]["device"].split(", "):
            found["engine"]["device"] += f", {mine}"
            write_json(path, found)

    def _write_timings(self, records: dict[str, ShardRecord]) -> None:
        """targets/<name>/timings.jsonl, one line a finished shard: how long it took, apart from what it holds."""
        lines = "".join(json.dumps(record.timing()) + "\n" for record in records.values())
        write_bytes(self.run.folder / "timings.jsonl", lines.encode())


@contextlib.contextmanager
def _room(
    run: ScoreRun, start: StartEngine, ray: str | None, engines: int | None
) -> Iterator[tuple[Room, int]]:
    """Where engines run, and how many there are."""
    with contextlib.ExitStack() as stack:
        if ray is None:
            size = local_engines(run.teacher, engines)
            room: Room = LocalRoom(run, size, start)
        else:
            from datastore import cluster

            connection = stack.enter_context(cluster.connected(ray))
            size = cluster.cluster_engines(connection, run.teacher, engines)
            room = cluster.RayRoom(connection, run, start)
        try:
            yield room, size
        except BaseException:
            room.close(at_once=True)
            raise
        room.close(at_once=False)


def _finished(job: ShardJob) -> ShardRecord | None:
    """The record of a shard that an earlier run finished and whose bytes are still those; else None."""
    if not job.record_path.exists():
        return None
    raw = json.loads(job.record_path.read_bytes())
    record = parse_config(ShardRecord, raw, str(job.record_path))
    file = job.run.folder / record.entry.name
    if file.is_file() and sha256_file(file) == record.entry.sha256:
        return record
    _LOG.warning("%s is absent or damaged: it is scored again", file)
    job.record_path.unlink()
    return None
