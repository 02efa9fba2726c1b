"""The real command on a made dataset: what the tests of whole runs share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.datastore import conftest as made
from tests.trainer.megatron.tiny import tiny_config

STEPS, SEQ_LEN = 8, 192
PROGRAM = str(Path(sys.executable).with_name("vpmoe-train"))


def write_run_config(folder: Path) -> Path:
    """A run of which every other row is scored and three of four rows of a global batch use targets, so that the
    stream mixes two orders.
    """
    return write_config(
        folder,
        unscored=tuple(range(0, 21, 2)),
        steps=STEPS,
        kd_share=0.75,
        optimizer={"lr": 1e-2, "normuon": {"lr": 2e-2}},
        schedule={"kind": "cosine", "warmup": 2},
        checkpoint={"every": 3, "keep": 2},
        eval={"every": 4, "rows": 5},
    )


def write_config(folder: Path, *, unscored: tuple[int, ...] = (), **changes: Any) -> Path:
    """A dataset of 21 train rows in two shards, and a config that trains a very small student on it."""
    rows = [made.pack([made.document(number % 6)], SEQ_LEN) for number in range(28)]
    made.write_dataset(
        folder / "data", {"train": [rows[:14], rows[14:21]], "valid": [rows[21:]]}, seq_len=SEQ_LEN
    )
    made.write_targets(folder / "data", unscored=unscored)
    student = tiny_config().student.resolved() | {
        "vocab_size": 201_088,
        "hidden": 16,
        "head_dim": 4,
    }
    values = {
        "dataset": str(folder / "data"),
        "student": student,
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(**values | changes).resolved()))
    return path


def command(processes: int, *arguments: str) -> list[str]:
    """vpmoe-train with these arguments, under torchrun for several processes."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    return [*([*launch, "--no-python"] if processes > 1 else []), PROGRAM, *arguments]


def run_program(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        command(processes, *arguments),
        capture_output=True,
        text=True,
        timeout=280,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """One thread a process."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def train(processes: int, config: Path, run: Path, *overrides: str) -> None:
    """`vpmoe-train kd` must succeed."""
    done = run_program(processes, "kd", str(config), f"run={run}", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]


def records(run: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_of(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every record that has this measure."""
    return [(record["step"], record[name]) for record in records(run) if name in record]
