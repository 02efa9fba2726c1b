"""The unit of work of the score stage: one target shard, what it leaves, and who may work on it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import Config
from common.errors import EngineError
from datastore.budget import BudgetSums
from datastore.container import FileEntry
from datastore.manifest import QuarantinedDocument
from datastore.selection import Selection
from datastore.teacher import TeacherConfig
from datastore.types import PackedRow, Split

# A run stops when more of its documents than this are quarantined: then the setup is at fault, not the documents.
MAX_QUARANTINED, MAX_QUARANTINED_SHARE = 10, 1e-3
# The kernel frees a killed worker's lock with its process; an NFSv4 server that of a lost machine after 90 s.
LOCK_WAIT_SEC = 120.0


class QuarantineError(EngineError):
    """Too many documents cannot be scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRun:
    """What all shards of a run share. dataset, folder (of the targets): absolute paths, the same on every machine.

    weights: `weights_identity` of the teacher. versions: of the packages, the same in every worker.
    """

    dataset: Path
    folder: Path
    teacher: TeacherConfig
    weights: dict[str, Any]
    versions: dict[str, str | None]
    selection: Selection
    target_id: str
    order_sha256: str

    @property
    def work(self) -> Path:
        """Where the state of the unfinished stage lies."""
        return self.folder / ".work"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """The unit of work: one target shard of a run."""

    run: ScoreRun
    split: Split
    shard: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.shard:05d}"

    @property
    def folder(self) -> Path:
        """Where its pieces lie until the shard is written."""
        return self.run.work / self.name

    @property
    def record_path(self) -> Path:
        return self.run.work / f"{self.name}.json"


class ShardRecord(Config):
    """A finished target shard, as .work keeps it. documents, tokens: scored ones. row_tokens: of all its documents.

    seconds: how long an engine of `devices` devices worked on it.
    """

    entry: FileEntry
    documents: int
    tokens: int
    row_tokens: int
    sums: BudgetSums
    quarantine: tuple[QuarantinedDocument, ...]
    seconds: float
    devices: int
    device: str

    @property
    def name(self) -> str:
        """Of its job: train-00000."""
        return Path(self.entry.name).with_suffix("").as_posix().replace("/shard-", "-")

    def timing(self) -> dict[str, Any]:
        """Its line of timings.jsonl."""
        split, _, shard = self.name.partition("-")
        return {
            "split": split,
            "shard": int(shard),
            "tokens": self.tokens,
            "targets": self.sums.positions,
            "documents": self.documents,
            "blob_bytes": self.sums.blob_bytes,
            "seconds": round(self.seconds, 3),
            "devices": self.devices,
            "device": self.device,
        }


def selected_documents(run: ScoreRun, row: PackedRow) -> list[int]:
    """The numbers of the documents of a row that are to be scored."""
    return np.flatnonzero(run.selection.documents(row)).tolist()


def require_few_quarantined(quarantined: int, documents: int, where: str) -> None:
    """QuarantineError when more than 10 and more than one in a thousand documents cannot be scored."""
    if quarantined > max(MAX_QUARANTINED, MAX_QUARANTINED_SHARE * documents):
        raise QuarantineError(
            f"{where}: no engine could score {quarantined} of {documents} documents",
            expected=f"at most {MAX_QUARANTINED}, or one in {1 / MAX_QUARANTINED_SHARE:.0f}",
            remedy="the reasons are in .work/*/piece-*.json; repair the engine, delete that folder of the shard and "
            "run the same command again",
        )


@contextlib.contextmanager
def lease(job: ShardJob) -> Iterator[str]:
    """Hold a shard for the block; gives the holder's mark, which `require_lease` compares.

    Raises EngineError when another worker still holds it after LOCK_WAIT_SEC.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    mark = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "mark": uuid.uuid4().hex})
    with open(job.folder / "lock", "a+") as handle:
        _wait_for_lock(handle.fileno(), job)
        handle.truncate(0)
        handle.write(mark)
        handle.flush()
        yield mark


def _wait_for_lock(fd: int, job: ShardJob) -> None:
    end = time.monotonic() + LOCK_WAIT_SEC
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise EngineError(
                    f"shard {job.name} is held by another worker",
                    got=(job.folder / "lock").read_text(),
                    remedy="stop that process, then run the same command again",
                ) from None
        time.sleep(0.2)


def require_lease(job: ShardJob, mark: str) -> None:
    """EngineError unless the shard is still held under `mark`: an encoder outlives its worker by a moment."""
    if (job.folder / "lock").read_text() != mark:
        raise EngineError(f"shard {job.name} was taken over by another worker")
