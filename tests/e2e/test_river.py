"""The programs as a user runs them, one after the other, on generated rows and on real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = Path(sys.executable).parent
CLASSES = ("reasoning", "final", "control")


def run(*command: str, expect: int = 0) -> str:
    """Run a program of the venv in the project's root; its output."""
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    output = result.stdout + result.stderr
    assert result.returncode == expect, f"{' '.join(command)}\n{output[-4000:]}"
    return output


@dataclass(frozen=True)
class River:
    """The folders of one run of everything, and its evaluation after the first and the last step."""

    data: Path
    run: Path

    def manifest(self, *parts: str) -> dict:
        return json.loads((self.data.joinpath(*parts) / "manifest.json").read_text())

    def metrics(self) -> list[dict]:
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def evaluations(self) -> list[dict]:
        return [record for record in self.metrics() if "eval/ce/final" in record]


# Teachers of a few steps hardly know the text; the limits of a real run would refuse them, as they should.
UNTAUGHT = ["budget.min_head_mass=0", "budget.min_realised_logprob=-12"]
UNTAUGHT_SCORE = ["limits.min_head_mass=0", "limits.min_realised_logprob=-12"]


def flow(
    folder: Path, sources: str, *, data: list[str], teacher_steps: int, kd: list[str]
) -> River:
    """Build, verify, teach, score, verify, train, through the command line."""
    river = River(folder / "data", folder / "run")
    dataset, teacher = str(river.data), str(folder / "teacher")
    manifest = ["--manifest", "configs/data/demo.yaml"]
    run("vpmoe-data", "build", *manifest, f"source.files=[{sources}]", f"out={dataset}", *data)
    run("vpmoe-data", "verify", dataset)
    tiny = ["--dataset", dataset, "--out", teacher, "--steps", str(teacher_steps)]
    run("python", "-m", "demo.tiny_teacher", *tiny)
    run("vpmoe-data", "score", "--teacher", "tiny", dataset, f"model={teacher}", *UNTAUGHT_SCORE)
    run("vpmoe-data", "verify", dataset)
    folders = [f"dataset={dataset}", f"run={river.run}"]
    run("vpmoe-train", "kd", "configs/demo.yaml", *folders, *UNTAUGHT, *kd)
    return river


@pytest.fixture(scope="module")
def sample_river(tmp_path_factory: pytest.TempPathFactory) -> River:
    folder = tmp_path_factory.mktemp("river")
    run("python", "-m", "demo.sample", "--out", str(folder / "source"), "--rows", "120")
    return flow(
        folder,
        f"{folder}/source/*.parquet",
        data=["seq_len=512"],
        teacher_steps=40,
        kd=[
            "steps=6",
            "eval.every=1",
            "eval.rows=2",
            "checkpoint.every=3",
            "batch.global_batch_size=4",
        ],
    )


@pytest.mark.slow
def test_students_loss_and_divergence_fall(sample_river: River) -> None:
    first, last = sample_river.evaluations()[0], sample_river.evaluations()[-1]
    for name in CLASSES:
        assert last[f"eval/ce/{name}"] < first[f"eval/ce/{name}"]
        assert last[f"eval/kl/{name}"] < first[f"eval/kl/{name}"]


@pytest.mark.slow
def test_eval_repeats_the_last_evaluation_of_training(sample_river: River) -> None:
    out = run("vpmoe-train", "eval", str(sample_river.run))
    last = sample_river.evaluations()[-1]
    for name in CLASSES:
        assert f"ce {last[f'eval/ce/{name}']:.4f}" in out


@pytest.mark.slow
def test_every_scored_token_is_a_target_of_the_dataset(sample_river: River) -> None:
    counts = sample_river.manifest()["counts"].values()
    targets = sample_river.manifest("targets", "tiny")
    spans = ("reasoning", "final")
    expected = sum(split["tokens_by_span"][span] for split in counts for span in spans)
    assert targets["budget"]["positions"] == expected
    assert targets["dataset_fingerprint"] == sample_river.manifest()["fingerprint"]


@pytest.mark.slow
def test_run_folder_says_what_it_saw(sample_river: River) -> None:
    described = json.loads((sample_river.run / "run.json").read_text())
    assert described["data"]["dataset"] == sample_river.manifest()["fingerprint"]
    assert described["data"]["targets"] == sample_river.manifest("targets", "tiny")["target_id"]
    assert described["versions"]["torch"] and described["git_sha"]
    assert "kd_share" in (sample_river.run / "config.yaml").read_text()


@pytest.mark.slow
def test_finished_stages_run_again_change_nothing(sample_river: River) -> None:
    before = {p: p.read_bytes() for p in sample_river.data.rglob("*.arrow")}
    source = sample_river.data.parent / "source"
    out = f"out={sample_river.data}"
    files = f"source.files=[{source}/*.parquet]"
    run("vpmoe-data", "build", "--manifest", "configs/data/demo.yaml", files, out, "seq_len=512")
    assert {p: p.read_bytes() for p in sample_river.data.rglob("*.arrow")} == before


@pytest.mark.slow
def test_poor_targets_are_refused(sample_river: River, tmp_path: Path) -> None:
    folders = [f"dataset={sample_river.data}", f"run={tmp_path}", "budget.min_head_mass=0.999"]
    out = run("vpmoe-train", "kd", "configs/demo.yaml", *folders, "steps=6", expect=1)
    assert "head mass" in out and "limit 0.999" in out and "Traceback" not in out


@pytest.mark.slow
def test_damaged_target_is_refused_before_the_first_step(
    sample_river: River, tmp_path: Path
) -> None:
    (shard,) = (sample_river.data / "targets" / "tiny" / "train").glob("*.arrow")
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-100])
        run("vpmoe-data", "verify", str(sample_river.data), expect=1)
        folders = [f"dataset={sample_river.data}", f"run={tmp_path}", "steps=6"]
        out = run("vpmoe-train", "kd", "configs/demo.yaml", *folders, *UNTAUGHT, expect=1)
        assert shard.name in out and "Traceback" not in out
    finally:
        shard.write_bytes(content)


@pytest.mark.slow
def test_real_rows_fill_their_sequences(synth_folder: Path, tmp_path: Path) -> None:
    files = f"source.files=[{synth_folder}/*.parquet]"
    manifest = ["--manifest", "configs/data/synth.yaml", "source.hub=null"]
    run("vpmoe-data", "build", *manifest, files, f"out={tmp_path}", "split.valid_fraction=0.1")
    run("vpmoe-data", "verify", str(tmp_path))
    counts = json.loads((tmp_path / "manifest.json").read_text())["counts"]
    assert sum(split["documents"] for split in counts.values()) > 580
    assert counts["train"]["fill"] >= 0.98


def write_shortest(synth_folder: Path, path: Path, *, rows: int) -> None:
    """The rows with the least text, as a teacher of a few steps on a CPU learns those soonest."""
    table = pq.read_table(sorted(synth_folder.glob("*.parquet"))[0])
    texts = [
        table[name].to_pylist() for name in ("query", "synthetic_reasoning", "synthetic_answer")
    ]
    lengths = [sum(map(len, row)) if all(row) else 1 << 30 for row in zip(*texts, strict=True)]
    shortest = sorted(range(len(lengths)), key=lengths.__getitem__)[:rows]
    pq.write_table(table.take(shortest), path)


@pytest.mark.slow
def test_real_rows_run_through(synth_folder: Path, tmp_path: Path) -> None:
    write_shortest(synth_folder, tmp_path / "rows.parquet", rows=16)
    river = flow(
        tmp_path,
        str(tmp_path / "rows.parquet"),
        data=["seq_len=1024", "split.valid_fraction=0.4"],
        teacher_steps=40,
        kd=[
            "steps=20",
            "batch={global_batch_size: 1, micro_batch_size: 1}",
            "eval={every: 0, rows: 2}",
        ],
    )
    steps = [record for record in river.metrics() if "loss/total" in record]
    assert len(steps) == 20
    assert steps[-1]["loss/ce/reasoning"] < steps[0]["loss/ce/reasoning"]
