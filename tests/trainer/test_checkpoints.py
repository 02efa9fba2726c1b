"""The checkpoint folder: `latest` is the truth, and what a killed writer left is swept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import FormatError
from trainer.checkpoints import latest_checkpoint, read_progress, sweep


def _complete(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir()
    ours = {"version": 2, "layout": {}, "step": step, "stream": {}, "provenance": {}}
    (path / "vpmoe.json").write_text(json.dumps(ours))
    return path


def test_without_a_pointer_there_is_no_checkpoint(tmp_path) -> None:
    _complete(tmp_path, 5)
    assert latest_checkpoint(tmp_path) is None
    assert read_progress(tmp_path) is None
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_pointer_names_the_checkpoint_and_later_leftovers_are_swept(tmp_path) -> None:
    for step in (5, 10, 15):
        _complete(tmp_path, step)
    (tmp_path / "latest").write_text("step-00000010\n")
    (tmp_path / ".tmp-step-00000020").mkdir()
    (tmp_path / ".tmp-abc-latest").write_text("step")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step-00000005",
        "step-00000010",
    ]
    progress = read_progress(tmp_path)
    assert progress is not None and progress.step == 10


def test_a_pointer_to_an_incomplete_checkpoint_is_refused(tmp_path) -> None:
    (_complete(tmp_path, 5) / "vpmoe.json").unlink()
    (tmp_path / "latest").write_text("step-00000005\n")
    with pytest.raises(FormatError, match="step-00000005, which is not a complete checkpoint"):
        latest_checkpoint(tmp_path)
