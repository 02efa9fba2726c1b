"""The revision of the code, from a checkout or from the image's file."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from common import provenance


def _commit(folder: Path, text: str) -> str:
    (folder / "file").write_text(text)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "file"], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    head = ["git", "rev-parse", "HEAD"]
    return subprocess.run(
        head, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_and_dirty_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PROJECT_ROOT", tmp_path)
    sha = _commit(tmp_path, "one")
    assert provenance.git_sha() == sha
    (tmp_path / "untracked").write_text("")
    assert provenance.git_sha() == sha
    (tmp_path / "file").write_text("two")
    assert provenance.git_sha() == sha + "-dirty"


def test_image_states_the_commit_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "PROJECT_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_sha() is None
    (tmp_path / "GIT_SHA").write_text("0123abcd\n")
    assert provenance.git_sha() == "0123abcd"


def test_versions_name_what_is_absent() -> None:
    versions = provenance.package_versions(("click", "no-such-package"))
    assert versions["click"] == importlib.metadata.version("click")
    assert versions["no-such-package"] is None and versions["python"]
