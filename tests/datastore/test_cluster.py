"""Ray as engine room of a build, and what stands where Ray is absent."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import PROJECT_ROOT
from common.errors import ConfigError
from datastore import cluster
from datastore.manifest import load_dataset_manifest


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ray's files under a short path, as its socket names are long, removed afterwards."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_build_in_ray_writes_the_same_bytes(
    sample_parquet: list[Path], small_dataset: Path, tmp_path: Path, ray_folder: Path
) -> None:
    overrides = [
        f"source.files=[{','.join(map(str, sample_parquet))}]",
        "render.developer=Think, then answer.",
        "split.valid_fraction=0.15",
        "shard.source_rows=100",
        "shard.valid_rows=32",
        "seq_len=256",
        f"out={tmp_path}",
    ]
    program = str(Path(sys.executable).with_name("vpmoe-data"))
    command = [program, "build", "--manifest", "configs/data/demo.yaml", "--ray", "local"]
    subprocess.run([*command, *overrides], check=True, cwd=PROJECT_ROOT)
    mine, local = load_dataset_manifest(tmp_path), load_dataset_manifest(small_dataset)
    assert mine.fingerprint == local.fingerprint and mine.counts == local.counts
    for entry in (*local.files["train"], *local.files["valid"]):
        assert (tmp_path / entry.name).read_bytes() == (small_dataset / entry.name).read_bytes()


def test_an_error_of_a_task_is_its_own(ray_folder: Path) -> None:
    with pytest.raises(ConfigError, match="override has no '='"):
        list(cluster.run_jobs(_fail, [1], address="local"))


def _fail(_job: int) -> None:
    raise ConfigError("an override has no '='")


def test_without_ray_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ConfigError, match=r"pip install 'vpmoe\[cluster\]'"),
        cluster.connected("local"),
    ):
        pass
