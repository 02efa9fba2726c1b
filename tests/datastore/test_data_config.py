"""The data configs that ship, and what a data config refuses."""

from __future__ import annotations

import pytest

from common.config import CONFIG_ROOT, load_config
from common.errors import ConfigError
from datastore.build import build_dataset
from datastore.data_config import DataConfig


def test_shipped_configs_are_as_documented():
    synth = load_config(DataConfig, CONFIG_ROOT / "data" / "synth.yaml")
    assert synth.source.hub.repo == "PleIAs/SYNTH"
    assert (synth.seq_len, synth.max_doc_tokens, synth.out) == (2048, 2048, "data/synth")
    demo = load_config(DataConfig, CONFIG_ROOT / "data" / "demo.yaml")
    assert (demo.source.hub, demo.out) == (None, "data/demo")


def test_max_doc_tokens_follows_seq_len_and_never_exceeds_it(tmp_path):
    path = CONFIG_ROOT / "data" / "synth.yaml"
    assert load_config(DataConfig, path, ("seq_len=1024",)).max_doc_tokens == 1024
    assert load_config(DataConfig, path, ("max_doc_tokens=600",)).resolved()["seq_len"] == 2048
    with pytest.raises(ConfigError, match="never split across rows"):
        load_config(DataConfig, path, ("max_doc_tokens=4096",))


def test_the_real_rows_build_to_98_percent(synth_folder, tmp_path):
    out = tmp_path / "out"
    files = f"source.files=['{synth_folder}/*.parquet']"
    config = load_config(DataConfig, CONFIG_ROOT / "data" / "synth.yaml", (files, f"out={out}"))
    manifest = build_dataset(config, workers=1)
    assert manifest.counts["train"].fill >= 0.98
    assert sum(source.rows for source in manifest.sources) == 600
