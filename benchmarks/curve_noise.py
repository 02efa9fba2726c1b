"""The noise floor of training on a GPU, and what a kill and a resume add to it (benchmarks/kd_curve.py noise)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from benchmarks.curve_runs import (
    Job,
    evaluations,
    failure,
    run_jobs,
    start,
    steps_of,
    stop,
    student_job,
)

WATCHED = ("loss/total", "grad_norm")
# deterministic: and which runs are not broken.
MODES = {"default_mode": ("false", ("a", "c", "d")), "deterministic_mode": ("true", ("a",))}


def measure_noise(
    work: Path,
    profile: str,
    steps: int,
    extra: Sequence[str],
    *,
    at_once: int,
    limit_sec: float,
) -> dict[str, Any]:
    """Unbroken runs against each other and against one killed after `steps` / 2 and resumed, in both modes.

    All are the same run: KD, one seed. Raises ClickException when one fails or does not end within limit_sec.
    """
    own = (f"steps={steps}", "checkpoint.keep=1", "seed=0", "loss.kd_weight=1.0", "eval.every=0")
    broken, unbroken = {}, {}
    for mode, (flag, names) in MODES.items():
        settings = (*own, f"deterministic={flag}", "eval.rows=8")
        whole = (*settings, f"checkpoint.every={steps}")
        half = (*settings, f"checkpoint.every={steps // 2}")
        unbroken[mode] = [
            student_job(work, f"noise/{mode}-{name}", profile, extra, whole, slot)
            for slot, name in enumerate(names)
        ]
        broken[mode] = student_job(work, f"noise/{mode}-broken", profile, extra, half, len(names))
    with ThreadPoolExecutor(at_once) as pool:
        limits = {"at_once": 1, "limit_sec": limit_sec}
        runs = [pool.submit(_run_broken, job, work, steps, limit_sec) for job in broken.values()]
        for job in (job for jobs in unbroken.values() for job in jobs):
            runs.append(pool.submit(run_jobs, [job], work, **limits))
        for run in runs:
            run.result()
    first = unbroken["default_mode"][0]
    return {
        "steps": steps,
        "resumed_at": steps // 2,
        "command": " ".join(["vpmoe-train", *first.arguments()]),
        "run": first.folder,
        "figures": {
            mode: _figures([job.folder for job in unbroken[mode]], broken[mode].folder, steps)
            for mode in MODES
        },
    }


def _run_broken(job: Job, work: Path, steps: int, limit_sec: float) -> None:
    """Kill the run once it is past the checkpoint in the middle, then let it go on to its end."""
    if job.is_done():
        return
    end = time.monotonic() + limit_sec
    process = start(job, work)
    try:
        while max(steps_of(job.folder), default=0) <= steps // 2:
            if process.poll() is not None and process.returncode:
                raise failure(job)
            if time.monotonic() > end:
                raise click.ClickException(f"{job.folder.name}: {limit_sec:.0f} s are over")
            time.sleep(0.02)
    finally:
        stop(process)
    if job.is_done():
        raise click.ClickException(f"{job.folder.name} ended before it was killed; give more steps")
    run_jobs([job], work, at_once=1, limit_sec=limit_sec)
    if "going on from step" not in job.log.read_text():
        raise click.ClickException(f"{job.folder.name} did not resume")


def _figures(unbroken: list[Path], broken: Path, steps: int) -> dict[str, Any]:
    pairs = list(itertools.combinations(unbroken, 2))
    broken_pairs = [(folder, broken) for folder in unbroken]
    figures: dict[str, Any] = {"unbroken_runs": len(unbroken)}
    for name in WATCHED:
        apart = _apart(broken_pairs, name, steps)
        figures[f"resumed_against_unbroken/{name}"] = _summary(apart, steps)
        if pairs:
            figures[f"unbroken_against_unbroken/{name}"] = _summary(
                _apart(pairs, name, steps), steps
            )
    last = {folder.name: evaluations(folder)[-1] for folder in (*unbroken, broken)}
    kept = ("eval/ce/reasoning", "eval/ce/final", "eval/kl/reasoning", "eval/kl/final")
    figures["last_evaluation"] = {name: {k: r[k] for k in kept} for name, r in last.items()}
    return figures


def _apart(pairs: list[tuple[Path, Path]], name: str, steps: int) -> list[float]:
    """Largest relative difference of any pair, for each step."""
    values = {path: steps_of(path) for pair in pairs for path in pair}
    return [
        max(
            abs(values[a][step][name] - values[b][step][name]) / abs(values[a][step][name])
            for a, b in pairs
        )
        for step in range(1, steps + 1)
    ]


def _summary(apart: list[float], steps: int) -> dict[str, Any]:
    return {
        "max_before_the_kill": max(apart[: steps // 2]),
        "max_after_it": max(apart[steps // 2 :]),
        "by_step": [float(f"{value:.3g}") for value in apart],
    }
