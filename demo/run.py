"""`make demo`: the whole river on the embedded default, by the commands that a user would type.

It starts clean: data/demo, data/demo-source, teachers/tiny and runs/demo are removed first. Each command is printed
before it runs; the table at the end is read from the manifests and the run's metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config import PROJECT_ROOT
from datastore.manifest import (
    DatasetManifest,
    TargetManifest,
    load_dataset_manifest,
    load_target_manifest,
)

ROWS = 600
SOURCE, DATASET, TEACHER, RUN = "data/demo-source", "data/demo", "teachers/tiny", "runs/demo"
COMMANDS = {
    "sample": f"python -m demo.sample --out {SOURCE} --rows {ROWS}",
    "build": "vpmoe-data build --manifest configs/data/demo.yaml",
    "verify rows": f"vpmoe-data verify {DATASET}",
    "teacher": f"python -m demo.tiny_teacher --dataset {DATASET} --out {TEACHER} --steps 400",
    "score": f"vpmoe-data score --teacher tiny {DATASET}",
    "verify targets": f"vpmoe-data verify {DATASET}",
    "train": "vpmoe-train kd configs/demo.yaml",
    "eval": f"vpmoe-train eval {RUN}",
}
CLASSES = ("reasoning", "final", "control")
_NO_NETWORK = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def main() -> None:
    """Run every command, then print what came out. Stops with the exit code of the first that fails."""
    os.chdir(PROJECT_ROOT)
    console = Console(highlight=False)
    for folder in (SOURCE, DATASET, TEACHER, RUN):
        shutil.rmtree(folder, ignore_errors=True)
    seconds = {name: run_command(console, command) for name, command in COMMANDS.items()}
    _report(console, seconds)


def environment() -> dict[str, str]:
    """Where the commands of the venv that runs this are found first, and nothing is fetched."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **_NO_NETWORK, "PATH": programs}


def run_command(console: Console, command: str) -> float:
    """Run one command; returns its wall time in seconds. Where it fails, this process ends with its exit code."""
    console.print(f"\n[bold]$ {command}[/bold]", soft_wrap=True)
    start = time.monotonic()
    result = subprocess.run(shlex.split(command), env=environment())
    if result.returncode:
        console.print(f"[red]the demo stopped: this command ended with {result.returncode}[/red]")
        sys.exit(result.returncode)
    return time.monotonic() - start


def _report(console: Console, seconds: dict[str, float]) -> None:
    dataset, targets = (
        load_dataset_manifest(Path(DATASET)),
        load_target_manifest(Path(DATASET), "tiny"),
    )
    metrics = [json.loads(line) for line in (Path(RUN) / "metrics.jsonl").read_text().splitlines()]
    table = Table(title="vpMoE demo", title_justify="left", show_header=False)
    for name, value in {
        **_data_lines(dataset),
        **_target_lines(targets),
        **_training_lines(metrics),
        **_speed_lines(dataset, metrics, seconds),
    }.items():
        table.add_row(name, value)
    console.print()
    console.print(table)
    console.print(
        "Look closer (the demo starts clean each time it runs):\n"
        f"  .venv/bin/vpmoe-data inspect {DATASET} --row 0    a row, its spans, the teacher beside it\n"
        f"  .venv/bin/vpmoe-data stats {DATASET}              counts and histograms\n"
        f"  .venv/bin/tensorboard --logdir {RUN}/tensorboard\n"
        "  docs/architecture.md, docs/format.md, docs/runbook.md",
        soft_wrap=True,
    )


def _data_lines(manifest: DatasetManifest) -> dict[str, str]:
    counts = manifest.counts
    train, valid = counts["train"], counts["valid"]
    spans = train.tokens_by_span
    return {
        "rows (train, valid)": f"{train.rows:,}, {valid.rows:,} of {manifest.seq_len} tokens",
        "documents": f"{train.documents:,}, {valid.documents:,}",
        "tokens in train": f"{train.tokens:,}: {spans.ignored:,} prompt, "
        f"{spans.reasoning:,} reasoning, {spans.final:,} final",
        "positions filled": f"{100 * train.fill:.1f} %",
        "rejected rows": ", ".join(f"{n} {reason}" for reason, n in manifest.rejects.items() if n),
    }


def _target_lines(manifest: TargetManifest) -> dict[str, str]:
    budget = manifest.budget
    mass = ", ".join(f"{100 * budget[c]['head_mass']:.1f} % {c}" for c in CLASSES if budget[c])
    return {
        "targets": f"{budget['bytes_per_token']:.1f} bytes a token",
        "teacher mass kept exactly": mass,
    }


def _training_lines(metrics: list[dict[str, Any]]) -> dict[str, str]:
    evals = [record for record in metrics if any(key.startswith("eval/") for key in record)]
    first, last = evals[0], evals[-1]
    return {
        f"{quantity.upper()} {name}, valid (step {first['step']} -> {last['step']})": (
            f"{first[f'eval/{quantity}/{name}']:.3f} -> {last[f'eval/{quantity}/{name}']:.3f} nats"
        )
        for quantity in ("ce", "kl")
        for name in CLASSES
    }


def _speed_lines(
    manifest: DatasetManifest, metrics: list[dict[str, Any]], seconds: dict[str, float]
) -> dict[str, str]:
    tokens = sum(counts.tokens for counts in manifest.counts.values())
    steps = [record["tokens_per_sec"] for record in metrics if "tokens_per_sec" in record]
    whole = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return {
        "build, with start-up": f"{tokens / seconds['build']:,.0f} tokens/s",
        "score, with start-up": f"{tokens / seconds['score']:,.0f} tokens/s",
        "train, median step": f"{statistics.median(steps):,.0f} tokens/s",
        "time": f"{whole}; {sum(seconds.values()):.0f} s in all",
    }


if __name__ == "__main__":
    main()
