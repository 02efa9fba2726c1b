"""Runs of `vpmoe-train kd` for benchmarks/kd_curve.py: a process each, some at a time, resumable, with a time limit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.curve_data import STUDENT_DATA
from common.config import PROJECT_ROOT, load_config
from trainer.config import KDConfig
from trainer.data import RunData

SLUG = "curve"
# A small teacher on text this rich keeps little mass in its head; the limits of a real run are for real teachers.
LIMITS = ("min_head_mass=0", "min_realised_logprob=-12")
PROFILES = {
    "cuda": (
        "configs/base.yaml",
        (
            "student.layers=8",
            "student.experts=64",
            "parallel={tensor: 1, expert: 1}",
            "batch={global_batch_size: 8, micro_batch_size: 8}",
            "recompute=false",
            "optimizer.lr=1.0e-3",
            "optimizer.normuon.lr=1.0e-2",
            "schedule={kind: cosine, warmup: 20, min_lr: 1.0e-4}",
        ),
    ),
    "cpu": (
        "configs/demo.yaml",
        (
            "batch={global_batch_size: 1, micro_batch_size: 1}",
            "schedule={kind: cosine, warmup: 1, min_lr: 3.0e-4}",
        ),
    ),
}
_POLL_SEC = 0.1


@dataclass(frozen=True)
class Job:
    """One run: its folder and the overrides of its config. slot: its number among runs that go on at a time."""

    config: str
    folder: Path
    overrides: tuple[str, ...]
    slot: int

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def arguments(self) -> list[str]:
        """What follows `vpmoe-train`."""
        return ["kd", self.config, f"run={self.folder}", *self.overrides]

    def steps(self) -> int:
        return load_config(KDConfig, PROJECT_ROOT / self.config, self.overrides).steps

    def is_done(self) -> bool:
        return any(r["step"] == self.steps() for r in evaluations(self.folder))


def student_job(
    work: Path, name: str, profile: str, extra: Sequence[str], own: Sequence[str], slot: int
) -> Job:
    """A run of the curve's student on the students' dataset and its targets under `work`."""
    config, settings = PROFILES[profile]
    data = (f"dataset={work / STUDENT_DATA}", f"teacher={SLUG}", *(f"budget.{v}" for v in LIMITS))
    return Job(config, work / name, (*settings, *data, *own, *extra), slot)


def start(job: Job, work: Path) -> subprocess.Popen[bytes]:
    """The run in a process group of its own, on one GPU, by its slot; compiled kernels are shared under `work`."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    environment = {name: str(work / "cache" / folder) for name, folder in caches.items()}
    if gpus := torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = str(job.slot % gpus)
    program = [sys.executable, "-c", "from trainer.cli import main; main()"]
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            [*program, *job.arguments()],
            cwd=PROJECT_ROOT,
            env=environment | os.environ,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a run with all its processes, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_jobs(jobs: Sequence[Job], work: Path, *, at_once: int, limit_sec: float) -> None:
    """Every job that is not done yet; the checkpoints of a finished one go, as they are large.

    Raises ClickException when the time is over, and with the end of its log when a run failed, once the others have
    ended; run again, what was finished stays.
    """
    waiting = [job for job in jobs if not job.is_done()]
    running: dict[subprocess.Popen[bytes], Job] = {}
    failed: list[Job] = []
    end = time.monotonic() + limit_sec
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                print(f"starting {job.folder.name}", flush=True)
                running[start(job, work)] = job
            time.sleep(_POLL_SEC)
            for process in [process for process in running if process.poll() is not None]:
                _settle(process, running.pop(process), failed)
            if time.monotonic() > end:
                raise click.ClickException(f"{limit_sec:.0f} s are over; run it again to go on")
    finally:
        for process in running:
            stop(process)
    if failed:
        raise failure(failed[0])


def _settle(process: subprocess.Popen[bytes], job: Job, failed: list[Job]) -> None:
    if process.returncode:
        print(f"failed {job.folder.name} (exit {process.returncode})", flush=True)
        failed.append(job)
        return
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    last = evaluations(job.folder)[-1]
    print(f"finished {job.folder.name}: valid CE {overall(last, 'ce'):.4f}", flush=True)


def failure(job: Job) -> click.ClickException:
    """What a failed run said last."""
    return click.ClickException(f"{job.folder.name} failed:\n{job.log.read_text()[-3000:]}")


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run, evaluations and steps; a line that is being written is left out."""
    path = folder / "metrics.jsonl"
    return list(_parsed(path.read_text().splitlines())) if path.is_file() else []


def _parsed(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, in order."""
    return [record for record in records(folder) if "eval/ce/final" in record]


def steps_of(folder: Path) -> dict[int, dict[str, Any]]:
    """The logged optimizer steps of a run by number."""
    return {r["step"]: r for r in records(folder) if "loss/total" in r}


def overall(record: dict[str, Any], quantity: str) -> float:
    """Mean over all targets of the valid split, reasoning and final together."""
    counts = {name: record[f"eval/positions/{name}"] for name in ("reasoning", "final")}
    total = sum(record[f"eval/{quantity}/{name}"] * count for name, count in counts.items())
    return total / sum(counts.values())


def order_hash(folder: Path) -> str:
    """sha256 over the rows of every step of a run, in order: equal for runs that saw the same tokens."""
    config = load_config(KDConfig, folder / "config.yaml")
    stream = RunData.open(config).stream(config)
    digest = hashlib.sha256()
    for batch in range(config.steps):
        digest.update(stream.peek(batch).tobytes())
    return digest.hexdigest()
