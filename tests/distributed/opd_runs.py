"""`vpmoe-train opd` on a made dataset with a made-up teacher: what the tests of whole OPD runs share."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import yaml

from tests.datastore import conftest as made
from tests.distributed.runs import command, records, run_program
from tests.distributed.started import plain
from tests.distributed.stored import assert_same_tensors, newest
from tests.trainer.megatron.tiny import tiny_config
from tests.trainer.opd.served import NAME

STEPS, SEQ_LEN = 6, 256
ROLLOUTS, ANCHOR_SHARE, STAGE_TOKENS = 4, 0.4, 150
# A run that samples each shard with the weights of now.
SYNCHRONOUS_STEPS = 3
SYNCHRONOUS = ("staleness=0", f"steps={SYNCHRONOUS_STEPS}", "checkpoint.every=2")
_WARM_STEPS = 40
_RUNTIME = (
    "device",
    "transformer_impl",
    "core_attention",
    "expert_compute",
    "precision",
    "deterministic",
)
_OF_OPD = ("init_from", "sampling", "curriculum", "anchor_share", "staleness", "samples")
# Measures that tell the time, and how far the sampler was ahead, which a run that goes on finds as its buffer stands.
_OF_THE_DAY = ("seconds/", "sampling/", "teacher/", "checkpoint/", "tokens_per_sec", "memory_gib")
_AHEAD = ("buffer/depth", "buffer/scored")
_SOON_SEC = 0.6


def write_opd_config(folder: Path, url: str) -> Path:
    """21 train rows of one document, 7 valid ones, and a config: a very small student, short rollouts.

    It starts from the run `warm` beside it, which `warm_up` makes.
    """
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
        **{key: runtime[key] for key in _RUNTIME},
        "init_from": {"run": str(folder / "warm")},
        "steps": STEPS,
        "staleness": 1,
        "batch": {"rollouts": ROLLOUTS, "micro_batch_size": 1},
        "sampling": {"slots": 3, "max_reasoning": 24, "max_final": 16},
        "anchor_share": ANCHOR_SHARE,
        "curriculum": [
            {"until": STAGE_TOKENS, "modes": {"low": 0.75, "medium": 0.25, "high": 0.0}},
            {"modes": {"low": 0.0, "medium": 0.0, "high": 1.0}, "rollouts_per_prompt": 2},
        ],
        "loss": {"chunk_tokens": 64},
        "optimizer": {"lr": 2e-3, "normuon": {"lr": 4e-3}},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every": 3},
        "eval": {"every": 4, "prompts": 3},
        "samples": {"every": 3, "count": 2},
    }
    path = folder / "opd.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def kd_config(config: Path, name: str, **changes: Any) -> Path:
    """NAME.yaml: a config of `vpmoe-train kd`, of the run NAME, with the student and the data of an OPD config."""
    shared = yaml.safe_load(config.read_text())
    for key in _OF_OPD:
        del shared[key]
    path = config.with_name(f"{name}.yaml")
    values = {"run": str(path.with_suffix("")), "eval": {"every": 0}}
    path.write_text(yaml.safe_dump(shared | values | changes))
    return path


def warm_up(config: Path) -> None:
    """The run that the others start from: without it rollouts end after a token, too few for the alignment gate."""
    warm = kd_config(
        config,
        "warm",
        teacher=None,
        steps=_WARM_STEPS,
        batch={"global_batch_size": 2, "micro_batch_size": 2},
        loss={"kd_weight": 0.0, "chunk_tokens": 64},
        optimizer={"lr": 2e-2, "normuon": {"lr": 3e-2}},
        checkpoint={"every": _WARM_STEPS},
    )
    done = run_program(1, "kd", str(warm))
    assert done.returncode == 0, done.stderr[-4000:]


def opd_command(processes: int, config: Path, run: Path, *overrides: str) -> list[str]:
    """The command of a run."""
    return command(processes, "opd", str(config), f"run={run}", *overrides)


def train(processes: int, config: Path, run: Path, *overrides: str) -> None:
    """`vpmoe-train opd` must succeed."""
    done = run_program(processes, "opd", str(config), f"run={run}", *overrides)
    assert done.returncode == 0, done.stderr[-4000:]


def kill_while_it_samples(config: Path, run: Path, steps: int, *overrides: str) -> None:
    """Start the run of so many steps, and SIGKILL it at a random moment soon after it has sampled one more shard."""
    before = _sampled(run)
    with plain(1, *opd_command(1, config, run, *overrides)) as started:
        started.wait_until(lambda: _sampled(run) > before or before == steps)
        moment = random.uniform(0, _SOON_SEC)
        time.sleep(moment)
        assert started.launched[0].poll() is None, started.said()[-4000:]
        started.kill()
    print(f"killed {moment:.3f} s after shard {_sampled(run)} of {steps} was sampled")


def _sampled(run: Path) -> int:
    return len(list((run / "buffer" / "rollouts" / "train").glob("shard-*.json")))


def durable(run: Path) -> dict[Path, tuple[int, int]]:
    """The records of what is sampled and scored, with what changes when one is written again."""
    stats = {path: path.stat() for path in (run / "buffer").rglob("train/shard-*.json")}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def steps_told(run: Path) -> dict[int, dict[str, float]]:
    """The measures of each step of the log, which has one record of it."""
    told = [record for record in records(run) if "loss/total" in record]
    assert len({record["step"] for record in told}) == len(told)
    return {record["step"]: record for record in told}


def _measures(run: Path) -> list[dict[str, float]]:
    """All records but for what tells the time."""
    kept = [
        {
            name: value
            for name, value in record.items()
            if not name.startswith(_OF_THE_DAY) and name not in _AHEAD
        }
        for record in records(run)
    ]
    return [record for record in kept if record.keys() != {"step"}]


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, optimizer, measures, samples and buffer, bit by bit."""
    assert_same_tensors(newest(one / "checkpoints"), newest(other / "checkpoints"))
    assert _measures(one) == _measures(other) != []
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes() != b""
    first, second = (_files(run / "buffer") for run in (one, other))
    assert first.keys() == second.keys() and len(first) > 10
    assert [name for name in first if first[name] != second[name]] == []


def _files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
