"""What happens when engines die, documents poison them, or a machine is lost: the output is that of a quiet run."""

from __future__ import annotations

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from common.config import PROJECT_ROOT, load_config, named_config
from common.errors import AlignmentError, ConfigError
from common.files import write_json
from datastore.manifest import TargetManifest, load_target_manifest
from datastore.reader import Dataset, TargetStore
from datastore.score import score_dataset
from datastore.score_job import QuarantineError
from datastore.selection import Selection
from datastore.target import content_key
from datastore.teacher import TeacherConfig
from datastore.types import SPLITS
from tests.datastore.made_engine import Harm, starting

SEQ_LEN = 512
SHARDS = ["train/shard-00000.arrow", "train/shard-00001.arrow", "valid/shard-00000.arrow"]


@pytest.fixture(scope="module", autouse=True)
def _root_on_the_path() -> None:
    """Engine processes import the made engine by its name."""
    if str(PROJECT_ROOT) not in sys.path:
        sys.path.insert(0, str(PROJECT_ROOT))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, handmade) -> Path:
    """A shard of three rows is a piece of two rows and a piece of one."""
    return handmade.three_a_row(tmp_path_factory.mktemp("fleet") / "dataset", SEQ_LEN)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    model = tmp_path_factory.mktemp("model")
    write_json(model / "config.json", {})
    overrides = (f"model={model}", "engine.documents_per_call=4")
    return load_config(TeacherConfig, named_config("teacher", "tiny"), overrides)


@pytest.fixture
def copy(tmp_path: Path, dataset: Path) -> Path:
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder, ignore=shutil.ignore_patterns("targets"))
    return folder


@pytest.fixture(scope="module")
def quiet(dataset: Path, teacher: TeacherConfig) -> TargetManifest:
    """A run in which nothing happens."""
    return score_dataset(dataset, teacher, start=starting(dataset.parent / "log"))


def key_of(dataset: Path, split: str, row: int, document: int) -> int:
    packed = Dataset.open(dataset).row(split, row)
    return content_key(packed.tokens_T[packed.documents()[document]])


def assert_same_shards(one: Path, other: Path) -> None:
    for name in SHARDS:
        mine, theirs = (folder / "targets/tiny" / name for folder in (one, other))
        assert mine.read_bytes() == theirs.read_bytes()


def test_a_quiet_run_scores_every_document_once(dataset: Path, quiet: TargetManifest) -> None:
    scored = collections.Counter((dataset.parent / "log").read_text().split())
    assert len(scored) == 24
    # The engine's noise was measured on all 24 through `score`; `score_packed` saw each once.
    assert set(scored.values()) == {1}
    assert quiet.counts["train"]["documents"] == 18 and quiet.counts["valid"]["documents"] == 6
    lines = (dataset / "targets/tiny/timings.jsonl").read_text().splitlines()
    timings = [json.loads(line) for line in lines]
    assert {(t["split"], t["shard"], t["documents"]) for t in timings} == {
        ("train", 0, 9),
        ("train", 1, 9),
        ("valid", 0, 6),
    }
    assert quiet.budget["positions"] == sum(t["targets"] for t in timings)


def test_an_engine_that_dies_loses_one_piece(copy, teacher, quiet, dataset, tmp_path) -> None:
    # The first document of the second piece of the first shard kills the process once.
    harm: dict[int, Harm] = {key_of(copy, "train", 2, 0): "exit once"}
    manifest = score_dataset(copy, teacher, engines=2, start=starting(tmp_path / "log", harm))
    assert manifest == quiet
    assert_same_shards(copy, dataset)
    scored = collections.Counter((tmp_path / "log").read_text().split())
    # What was scored but not encoded is scored again: at most the piece of six documents before it.
    assert len(scored) == 24 and sum(scored.values()) <= 24 + 6


def test_encoders_that_die_lose_no_document(copy, teacher, quiet, dataset, tmp_path) -> None:
    harm: dict[int, Harm] = {key_of(copy, "train", 2, 0): "encoders once"}
    manifest = score_dataset(copy, teacher, start=starting(tmp_path / "log", harm))
    assert (tmp_path / "log.once").exists()
    assert manifest == quiet
    assert_same_shards(copy, dataset)


def test_poison_documents_are_quarantined(copy, teacher, quiet, tmp_path, dataset) -> None:
    """One kills its process, one raises, one gives NaN, one impossible targets: each alone is None in its row."""
    poison: dict[tuple, Harm] = {
        ("train", 2, 0): "exit",
        ("train", 5, 2): "raise",
        ("valid", 0, 1): "nan",
        ("valid", 1, 0): "impossible",
    }
    harm = {key_of(copy, *place): kind for place, kind in poison.items()}
    manifest = score_dataset(copy, teacher, start=starting(tmp_path / "log", harm))
    found = {
        (q.split, q.row + 3 * q.shard, q.document): (q.doc_id, q.reason)
        for q in manifest.quarantine
    }
    assert found.keys() == poison.keys()
    for place, reason in zip(
        poison, ("died, 3 times", "CUDA out of memory", "NaN", "mass"), strict=True
    ):
        assert reason in found[place][1]
    opened, other = Dataset.open(copy), Dataset.open(dataset)
    store, undisturbed = TargetStore.open(opened, "tiny"), TargetStore.open(other, "tiny")
    for split in SPLITS:
        for index in range(opened.num_rows(split)):
            row = opened.row(split, index)
            harmed = [(split, index, document) in poison for document in range(3)]
            if not any(harmed):
                blob = undisturbed.blob(split, index, row.row_hash)
                assert store.blob(split, index, row.row_hash) == blob
                continue
            documents = store.documents(split, index, row)
            assert [document is None for document in documents] == harmed
            for mine, theirs in zip(
                documents, undisturbed.documents(split, index, row), strict=True
            ):
                assert mine is None or np.array_equal(mine.target.ids_E, theirs.target.ids_E)
    assert sum(counts["documents"] for counts in manifest.counts.values()) == 20


def test_too_many_poison_documents_stop_the_run(copy, teacher, tmp_path) -> None:
    harm = {
        key_of(copy, "train", row, document): "nan" for row in range(6) for document in range(3)
    }
    with pytest.raises(QuarantineError, match=r"could score 1\d of [12]\d documents"):
        score_dataset(copy, teacher, start=starting(tmp_path / "log", harm))
    assert not (copy / "targets/tiny/manifest.json").exists()


def test_a_shard_outside_the_limits_stops_the_run(copy, teacher, tmp_path) -> None:
    limits = teacher.limits.model_copy(update={"min_realised_logprob": -1e-3})
    strict = teacher.model_copy(update={"limits": limits})
    with pytest.raises(AlignmentError, match=r"shard-0000\d\.arrow are outside"):
        score_dataset(copy, strict, start=starting(tmp_path / "log"))


def test_a_selection_scores_only_what_it_names(copy, teacher, tmp_path, quiet) -> None:
    lengths = [
        where.stop - where.start
        for row in [Dataset.open(copy).row("train", 0)]
        for where in row.documents()
    ]
    selection = Selection(min_tokens=max(lengths))
    part = score_dataset(copy, teacher, selection=selection, start=starting(tmp_path / "log"))
    assert part.selection == selection.resolved() and part.target_id != quiet.target_id
    opened = Dataset.open(copy)
    store = TargetStore.open(opened, "tiny")
    for split in SPLITS:
        for index in range(opened.num_rows(split)):
            row = opened.row(split, index)
            found = store.documents(split, index, row) or [None] * 3
            long = [where.stop - where.start >= max(lengths) for where in row.documents()]
            assert [document is not None for document in found] == long
    nothing = Selection(min_tokens=SEQ_LEN)
    with pytest.raises(ConfigError, match="matches no document"):
        score_dataset(
            copy,
            teacher.model_copy(update={"name": "none"}),
            selection=nothing,
            start=starting(tmp_path / "log"),
        )


_DRIVER = """
import sys
from pathlib import Path
from common.config import load_config
from datastore.score import score_dataset
from datastore.teacher import TeacherConfig
from tests.datastore.made_engine import starting

if __name__ == "__main__":
    folder, teacher = Path(sys.argv[1]), load_config(TeacherConfig, Path(sys.argv[2]))
    score_dataset(folder, teacher, ray="local", engines=2, start=starting(Path(sys.argv[3]), {}, 0.5))
"""


@pytest.mark.slow
def test_ray_with_a_killed_worker_writes_the_same(copy, teacher, quiet, dataset, tmp_path) -> None:
    write_json(tmp_path / "teacher.yaml", teacher.resolved())
    arguments = [str(copy), str(tmp_path / "teacher.yaml"), str(tmp_path / "log")]
    work = copy / "targets/tiny/.work"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as ray_folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT_ROOT),
            "RAY_TMPDIR": ray_folder,
            "OMP_NUM_THREADS": "1",
        }
        run = subprocess.Popen([sys.executable, "-c", _DRIVER, *arguments], env=environment)
        while run.poll() is None and not (begun := list(work.glob("*/piece-*"))):
            time.sleep(0.02)
        holder = json.loads((begun[0].parent / "lock").read_text())
        os.kill(holder["pid"], signal.SIGKILL)
        assert run.wait() == 0
    assert load_target_manifest(copy, "tiny") == quiet
    assert_same_shards(copy, dataset)
    assert not list(work.glob("*/"))
