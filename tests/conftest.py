"""Data that many tests share: a sample in the SYNTH schema, a dataset built from it, the real rows where present."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from common.config import PROJECT_ROOT
from datastore.build import build_dataset
from datastore.data_config import DataConfig
from datastore.source import COLUMNS
from datastore.types import SourceRow
from demo.sample import write_sample

SAMPLE_ROWS = 400

# A shell without job control starts what runs in its background with SIGINT ignored, and programs under test would
# inherit that and rightly keep it: tests that send one would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sample_parquet(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two parquet files with 400 short rows in the SYNTH schema, every awkward case among them."""
    return write_sample(tmp_path_factory.mktemp("sample"), rows=SAMPLE_ROWS, seed=0)


@pytest.fixture(scope="session")
def small_dataset(sample_parquet: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of rows of 256 tokens: four train shards and two valid shards with several rows each."""
    out = tmp_path_factory.mktemp("small") / "dataset"
    config = DataConfig(
        source={"files": [str(path) for path in sample_parquet]},
        render={"developer": "Think, then answer."},  # short, so that a row holds two documents
        split={"valid_fraction": 0.15},
        shard={"source_rows": 100, "valid_rows": 32},
        seq_len=256,
        out=str(out),
    )
    build_dataset(config, workers=1)
    return out


@pytest.fixture(scope="session")
def synth_folder() -> Path:
    """The folder of 600 real SYNTH rows with their reference tokens; skips where it is absent."""
    folder = Path(os.environ.get("VPMOE_SYNTH", PROJECT_ROOT.parent / "shared" / "synth"))
    if not (folder / "reference_tokens.npz").is_file():
        pytest.skip(f"needs the real SYNTH rows in {folder} (set VPMOE_SYNTH to their folder)")
    return folder


@pytest.fixture(scope="session")
def synth_rows(synth_folder: Path) -> list[SourceRow]:
    """600 real SYNTH rows, in the order of reference_tokens.npz."""
    files = sorted(synth_folder.glob("synth_*.parquet"))
    rows = [row for file in files for row in pq.read_table(file, columns=list(COLUMNS)).to_pylist()]
    return [SourceRow(**row) for row in rows]
