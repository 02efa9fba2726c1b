"""The score stage: what it writes, that it refuses, and that a killed run resumes to the same bytes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.config import load_config, named_config
from common.errors import AlignmentError, ConfigError, ResumeError
from common.files import exclusive_lock
from datastore.alignment import alignment_report, require_aligned
from datastore.harmony import RenderConfig
from datastore.manifest import TargetManifest, load_target_manifest
from datastore.prompt import Prefix, document_prefix
from datastore.reader import Dataset, TargetStore
from datastore.score import score_dataset
from datastore.score_encode import GATE_POSITIONS, _Gate
from datastore.target import row_target
from datastore.teacher import SystemText, TeacherConfig
from datastore.types import SPLITS, DocTarget
from demo.tiny_teacher import train_tiny_teacher

SEQ_LEN = 512
SHARDS = ["train/shard-00000.arrow", "train/shard-00001.arrow", "valid/shard-00000.arrow"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, handmade) -> Path:
    return handmade.three_a_row(tmp_path_factory.mktemp("scored") / "dataset", SEQ_LEN)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, handmade) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    documents = [handmade.document(i) for i in range(24)]
    pairs = [(d.tokens_T, d.spans_T) for d in documents]
    return train_tiny_teacher(folder, pairs, seed=1, steps=40, source="test")


def teacher(model: Path, *overrides: str) -> TeacherConfig:
    return load_config(
        TeacherConfig, named_config("teacher", "tiny"), (f"model={model}", *overrides)
    )


def command(dataset: Path, model: Path) -> list[str]:
    program = str(Path(sys.executable).with_name("vpmoe-data"))
    return [
        program,
        "score",
        "--teacher",
        "tiny",
        str(dataset),
        f"model={model}",
        "engine.documents_per_call=4",
    ]


@pytest.fixture(scope="module")
def uninterrupted(dataset: Path, model: Path) -> TargetManifest:
    subprocess.run(command(dataset, model), check=True, cwd=Path(__file__).parents[2])
    return load_target_manifest(dataset, "tiny")


@pytest.mark.slow
def test_every_document_has_its_targets(dataset: Path, uninterrupted: TargetManifest) -> None:
    opened = Dataset.open(dataset)
    store = TargetStore.open(opened, "tiny")
    pairs = []
    for split in SPLITS:
        for index in range(opened.num_rows(split)):
            row = opened.row(split, index)
            pairs.append((row.tokens_T, row_target(store.documents(split, index, row), row)))
    require_aligned(alignment_report(pairs))
    tokens = sum(counts.tokens for counts in opened.manifest.counts.values())
    assert sum(counts["tokens"] for counts in uninterrupted.counts.values()) == tokens
    targets = sum(len(target.positions_P) for _, target in pairs)
    assert uninterrupted.budget["positions"] == targets
    mean = np.mean(np.concatenate([target.realised_logprob_P for _, target in pairs]))
    spans = [uninterrupted.budget[span] for span in ("reasoning", "final")]
    summed = sum(span["realised_logprob"] * span["positions"] for span in spans)
    assert summed / targets == pytest.approx(mean, abs=2e-3)
    assert uninterrupted.engine["weights"][0]["name"] == "model.safetensors"


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, dataset: Path, model: Path, uninterrupted: TargetManifest
) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy, ignore=shutil.ignore_patterns("targets"))
    folder = copy / "targets" / "tiny"
    run = subprocess.Popen(
        command(copy, model), cwd=Path(__file__).parents[2], start_new_session=True
    )
    try:
        while run.poll() is None and not (folder / ".work" / "train-00000.json").exists():
            time.sleep(0.01)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert not (folder / "manifest.json").exists()
    # A finished shard that was damaged since is scored again, too.
    shard = folder / SHARDS[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    subprocess.run(command(copy, model), check=True, cwd=Path(__file__).parents[2])
    assert load_target_manifest(copy, "tiny") == uninterrupted
    for name in SHARDS:
        assert (folder / name).read_bytes() == (dataset / "targets/tiny" / name).read_bytes()
    assert not list(folder.rglob(".tmp-*"))
    assert _processes_of_group(run.pid) == []


def _processes_of_group(group: int) -> list[int]:
    """Living processes of a process group: what a killed run would have left behind."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
def test_a_complete_store_is_kept(dataset, model, uninterrupted) -> None:
    before = [(dataset / "targets/tiny" / name).stat().st_mtime_ns for name in SHARDS]
    assert score_dataset(dataset, teacher(model)) == uninterrupted.model_copy(
        update={"teacher": teacher(model).resolved()}
    )
    assert [(dataset / "targets/tiny" / name).stat().st_mtime_ns for name in SHARDS] == before


@pytest.mark.slow
def test_another_teacher_in_the_same_folder_is_refused(dataset, model, uninterrupted) -> None:
    with pytest.raises(ResumeError, match=r"threshold: 0\.02 -> 0\.05.*name=tiny-2"):
        score_dataset(dataset, teacher(model, "threshold=0.05"))


def test_a_second_writer_is_refused(tmp_path: Path, dataset: Path, model: Path) -> None:
    with (
        exclusive_lock(dataset / "targets" / "other" / ".work" / "lock", "test"),
        pytest.raises(ResumeError, match="another process"),
    ):
        score_dataset(dataset, teacher(model, "name=other"))


def test_documents_longer_than_the_engine_takes_are_refused(dataset: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match=f"engine.max_model_len={SEQ_LEN}"):
        score_dataset(dataset, teacher(model, "engine.max_model_len=511"))


def test_a_missing_model_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no local model folder"):
        score_dataset(dataset, teacher(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "override", ["temperature=0.8", "dtype=bfloat16", "threshold=0.6", "revision=main"]
)
def test_a_teacher_that_cannot_be_is_refused(model: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        teacher(model, override)


def test_the_locked_teacher_parses() -> None:
    config = load_config(TeacherConfig, named_config("teacher", "gpt-oss-120b"))
    assert config.model == "openai/gpt-oss-120b"
    assert config.engine.device == "cuda"


def test_targets_depend_on_what_shapes_them_alone(model: Path) -> None:
    base = teacher(model).shaping()
    for same in ("engine.max_num_seqs=3", "engine.vocab_chunk_tokens=7", "name=other"):
        assert teacher(model, same).shaping() == base
    for other in ("threshold=0.03", "system={reasoning: low}", "engine.tensor_parallel_size=2"):
        assert teacher(model, other).shaping() != base


def test_the_gate_stops_targets_of_other_tokens(handmade) -> None:
    rows = [handmade.pack([handmade.document(i)], SEQ_LEN) for i in range(90)]
    gate = _Gate()
    for row in rows:
        gate.see(row, handmade.row_documents(row))
    assert gate.positions >= GATE_POSITIONS
    gate.judge()
    gate = _Gate()
    for row, other in itertools.pairwise(rows):
        mine, theirs = handmade.row_documents(row)[0], handmade.row_documents(other)[0]
        if len(mine.target.positions_P) == len(theirs.target.positions_P):
            wrong = DocTarget(
                content_key=mine.content_key,
                target=theirs.target,
                entropy_sums=theirs.entropy_sums,
            )
            gate.see(row, [wrong])
    assert gate.positions >= GATE_POSITIONS
    with pytest.raises(AlignmentError, match="do not fit"):
        gate.judge()


def test_a_document_with_another_prefix_is_refused(handmade) -> None:
    document = handmade.document(1)
    prefix = Prefix(np.array([1, 2, 3], np.int32), np.array([4], np.int32), "text", "low")
    with pytest.raises(AlignmentError, match="does not open with the prefix"):
        prefix.request(document.tokens_T, document.spans_T)


def test_the_manifest_names_the_mode(handmade, dataset: Path, model: Path) -> None:
    manifest = Dataset.open(dataset).manifest.model_copy(
        update={"config": {"render": RenderConfig(reasoning="medium").resolved()}}
    )
    own = document_prefix(manifest, teacher(model))
    assert (own.shift, own.system_text, own.reasoning) == (0, None, "medium")
    swapped = document_prefix(
        manifest,
        teacher(model).model_copy(update={"system": SystemText(identity="You are a teacher.")}),
    )
    assert swapped.reasoning == "medium"
    assert swapped.system_text.startswith("You are a teacher.\n")


@pytest.mark.slow
def test_records_are_plain_json(dataset: Path, uninterrupted: TargetManifest) -> None:
    work = dataset / "targets" / "tiny" / ".work"
    record = json.loads((work / "train-00000.json").read_bytes())
    assert record["entry"] == uninterrupted.files["train"][0].resolved()
