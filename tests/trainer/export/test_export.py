"""The export as a stranger reads it: the student's own logits, generation, dtypes; and the folder's promises."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import tokenizer
from common.files import sha256_file
from tests.trainer.export.exported import STEPS, Exported, exported, program

pytestmark = pytest.mark.slow
READER = Path(__file__).with_name("reader.py")


@pytest.fixture(scope="module", params=["every feature", "no feature"])
def made(
    request: pytest.FixtureRequest, small_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """A trained and exported student."""
    if request.param == "every feature":
        return request.getfixturevalue("full_export")
    nothing = {"tpa": None, "grape_m": None, "value_residual": None}
    return exported(tmp_path_factory.mktemp("plain_export"), small_dataset, **nothing)


@pytest.fixture(scope="module")
def answers(made: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What a fresh process without this project reads from a copy of the folder, started elsewhere."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(made.folder, folder / "model")
    np.savez(folder / "questions.npz", *made.documents)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(READER), "model", "questions.npz", "answers.npz"],
        cwd=folder,
        env=environment | {"HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(folder / "answers.npz"))


def test_logits_are_those_of_the_student(made: Exported, answers: dict[str, np.ndarray]) -> None:
    for number, logits in enumerate(made.logits):
        assert np.abs(logits).max() > 1
        np.testing.assert_allclose(answers[f"logits{number}"], logits, rtol=0, atol=1e-4)


def test_a_cache_changes_nothing(answers: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(answers["cached"], answers["uncached"])
    assert len(np.unique(answers["cached"])) > 3


def test_left_padding_changes_nothing(answers: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(answers["padded"], answers["cached"])


def test_loss_is_the_mean_cross_entropy(made: Exported, answers: dict[str, np.ndarray]) -> None:
    logits, labels = made.logits[0].astype(np.float64)[:-1], made.documents[0][1:]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -logprobs[np.arange(len(labels)), labels].mean()
    assert answers["loss"] == pytest.approx(expected, rel=1e-4)


def test_config_is_read(answers: dict[str, np.ndarray]) -> None:
    assert answers["dtype"].tolist() == ["torch.float32", "VpMoEConfig"]
    assert answers["stops"].tolist() == [200_002, 199_999, 200_012]
    assert answers["prompt"][-2:].tolist() == [
        tokenizer.START,
        *tokenizer.encoding().encode_ordinary("assistant"),
    ]


def test_bf16_keeps_what_must_stay_fp32(made: Exported, answers: dict[str, np.ndarray]) -> None:
    config = json.loads((made.folder / "config.json").read_text())
    kept = {"expert_bias"}
    kept |= {"value_residual_logit"} if config["value_residual"] else set()
    kept |= {"log_frequency"} if config["frequency_log_scale"] else set()
    assert answers["half_dtype"].tolist() == ["torch.bfloat16", *sorted(kept)]
    difference = np.abs(answers["half"] - made.logits[0])
    assert 1e-4 < difference.mean() < 0.1 * np.abs(made.logits[0]).mean()


def test_the_manifest_lists_every_file_and_its_hash(made: Exported) -> None:
    manifest = json.loads((made.folder / "export.json").read_text())
    assert manifest["source"]["step"] == STEPS and manifest["source"]["run"] == "run"
    listed = manifest["files"]
    assert {p.name for p in made.folder.iterdir()} == {*listed, "export.json"}
    assert {name: d["sha256"] for name, d in listed.items()} == {
        name: sha256_file(made.folder / name) for name in listed
    }
    card = (made.folder / "README.md").read_text()
    assert manifest["source"]["dataset"] in card and str(manifest["source"]["config_hash"]) in card


def test_again_is_nothing_and_another_is_refused(made: Exported) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in made.folder.iterdir()}
    command = ("vpmoe-train", "export", str(made.run), "--out", str(made.folder))
    assert "holds this very export already" in program(*command)
    refused = program(*command, "--dtype", "bf16", expect=1)
    assert "dtype: there 'fp32', wanted 'bf16'" in refused and "--out" in refused
    assert {p.name: p.stat().st_mtime_ns for p in made.folder.iterdir()} == before


def test_a_foreign_folder_a_foreign_dataset_and_an_absent_step_are_refused(
    made: Exported, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    run = str(made.run)
    out = str(tmp_path / "mine")
    assert "is no export" in program("vpmoe-train", "export", run, "--out", out, expect=1)
    missing = program("vpmoe-train", "export", run, "--dataset", str(tmp_path), expect=1)
    assert "--dataset" in missing
    assert "no checkpoint of step 7" in program(
        "vpmoe-train", "export", run, "--step", "7", expect=1
    )
    assert list((tmp_path / "mine").iterdir()) == []
