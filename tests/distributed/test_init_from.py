"""Runs that start from the weights of another: exactly these, once, and every difference accounted for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.distributed.runs import STEPS, records, run_program, train, write_run_config
from tests.distributed.stored import newest, stored_tensors

MORE_LAYERS = ("student.layers=8", 'init_from.new=["decoder.layers.[4-7].*"]')


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of runs that start from `source` beside it."""
    path = write_run_config(tmp_path_factory.mktemp("init-from"))
    train(1, path, path.parent / "source")
    changed = yaml.safe_load(path.read_text()) | {
        "init_from": {"run": str(path.parent / "source")},
        "steps": 2,
        "schedule": {"kind": "constant"},
        "checkpoint": {"every": 1, "keep": 2},
    }
    path.write_text(yaml.safe_dump(changed))
    return path


def _evaluations(run: Path) -> list[dict]:
    return [record for record in records(run) if "eval/total" in record]


@pytest.mark.slow
def test_the_first_evaluation_is_the_last_of_the_source(config_path: Path) -> None:
    source, run = config_path.parent / "source", config_path.parent / "same"
    train(1, config_path, run)
    first, last = _evaluations(run)[0], _evaluations(source)[-1]
    assert (first.pop("step"), last.pop("step")) == (0, STEPS)
    assert first == last
    table = json.loads((run / "init_from.json").read_text())
    stored = {
        n: t for n, t in stored_tensors(newest(source / "checkpoints")).items() if "optim" not in n
    }
    assert sum(row["tensors"] for row in table["taken"]) == len(stored)
    assert sum(row["parameters"] for row in table["taken"]) == sum(
        t.numel() for t in stored.values()
    )
    assert any(row["name"].endswith("mlp.router.expert_bias") for row in table["taken"])
    assert (table["new"], table["dropped"], table["step"]) == ([], [], STEPS)
    kept = json.loads((newest(run / "checkpoints") / "vpmoe.json").read_text())["provenance"]
    assert kept["init_from"] == {
        key: table[key] for key in ("run", "step", "provenance", "git_sha")
    }


@pytest.mark.slow
def test_a_deeper_student_resumes_without_its_source(config_path: Path) -> None:
    source, run = config_path.parent / "source", config_path.parent / "deeper"
    done = run_program(1, "kd", str(config_path), f"run={run}", *MORE_LAYERS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "decoder.layers.{4..7}.mlp.experts.fc1_weight" in done.stderr
    table = json.loads((run / "init_from.json").read_text())
    assert all(row["name"].startswith("decoder.layers.") for row in table["new"]) and table["taken"]

    end = stored_tensors(newest(run / "checkpoints"))
    shutil.rmtree(newest(run / "checkpoints"))
    (run / "checkpoints" / "latest").write_text("step-00000001\n")
    hidden = source.rename(source.with_name("gone"))
    try:
        train(1, config_path, run, *MORE_LAYERS)
    finally:
        hidden.rename(source)
    again = stored_tensors(newest(run / "checkpoints"))
    assert [name for name in end if not end[name].equal(again[name])] == []
    assert json.loads((newest(run / "checkpoints") / "vpmoe.json").read_text())["provenance"][
        "init_from"
    ] == {key: table[key] for key in ("run", "step", "provenance", "git_sha")}


@pytest.mark.slow
def test_what_no_pattern_names_and_another_tokenizer_are_refused(config_path: Path) -> None:
    run = config_path.parent / "refused"
    plain = run_program(
        1, "kd", str(config_path), f"run={run}", "student.tpa=null", 'init_from.new=["*.nothing"]'
    )
    assert plain.returncode == 2, plain.stderr[-3000:]
    assert (
        "only in the student, not in init_from.new: decoder.layers.{0..2}.self_attention.linear_qkv.weight"
        in (plain.stderr)
    )
    assert (
        "only in the checkpoint, not in init_from.drop: decoder.layers.{0..2}.self_attention"
        in plain.stderr
    )
    assert "init_from.new names nothing that is only in the student: *.nothing" in plain.stderr

    foreign = config_path.parent / "foreign"
    shutil.copytree(config_path.parent / "source", foreign)
    ours = newest(foreign / "checkpoints") / "vpmoe.json"
    content = json.loads(ours.read_text())
    content["provenance"]["data"]["tokenizer"] = "another"
    ours.write_text(json.dumps(content))
    other = run_program(1, "kd", str(config_path), f"run={run}", f"init_from.run={foreign}")
    assert other.returncode == 2 and "was trained on another tokenizer" in other.stderr
    assert "Traceback" not in plain.stderr + other.stderr and not (run / "metrics.jsonl").exists()
