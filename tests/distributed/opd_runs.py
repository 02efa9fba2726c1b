"""`vpmoe-train opd` on a made dataset with a made-up teacher: what the tests of whole OPD runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.datastore import conftest as made
from tests.distributed.runs import command, run_program
from tests.trainer.megatron.tiny import tiny_config
from tests.trainer.opd.served import NAME

STEPS, SEQ_LEN = 7, 256


def write_opd_config(folder: Path, url: str, **changes: Any) -> Path:
    """21 train rows of one document, 7 valid ones, and a config: a very small student, short rollouts."""
    rows = [made.pack([made.document(number)], SEQ_LEN) for number in range(28)]
    made.write_dataset(
        folder / "data", {"train": [rows[:14], rows[14:21]], "valid": [rows[21:]]}, seq_len=SEQ_LEN
    )
    runtime = tiny_config().resolved()
    student = runtime["student"] | {"vocab_size": 201_088, "hidden": 16, "head_dim": 4}
    values = {
        "run": str(folder / "run"),
        "dataset": str(folder / "data"),
        "teacher": {"name": NAME, "url": url},
        "student": student,
        **{
            key: runtime[key]
            for key in (
                "device",
                "transformer_impl",
                "core_attention",
                "expert_compute",
                "precision",
                "deterministic",
            )
        },
        "steps": STEPS,
        "staleness": 1,
        "batch": {"rollouts": 4, "micro_batch_size": 1},
        "sampling": {"slots": 3, "max_reasoning": 24, "max_final": 16},
        "anchor_share": 0.4,
        "curriculum": [
            {"until": 150, "modes": {"low": 0.7, "medium": 0.3, "high": 0.0}},
            {"modes": {"low": 0.1, "medium": 0.3, "high": 0.6}, "rollouts_per_prompt": 2},
        ],
        "loss": {"chunk_tokens": 64},
        "optimizer": {"lr": 1e-2, "normuon": {"lr": 2e-2}},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every": 3},
        "eval": {"every": 4, "prompts": 4},
        "samples": {"every": 3, "count": 2},
    }
    path = folder / "opd.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def opd_command(processes: int, config: Path, run: Path, *overrides: str) -> list[str]:
    """The command of a run."""
    return command(processes, "opd", str(config), f"run={run}", *overrides)


def train(processes: int, config: Path, run: Path, *overrides: str) -> None:
    """`vpmoe-train opd` must succeed."""
    done = run_program(processes, "opd", str(config), f"run={run}", *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
