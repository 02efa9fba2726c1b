"""A manifest is believed whole or refused with the reason."""

import json
import os
import random
from pathlib import Path

import pytest

from common.errors import ConfigError, FormatError
from datastore.manifest import (
    DatasetManifest,
    commit_manifest,
    dataset_fingerprint,
    load_dataset_manifest,
    load_target_manifest,
)
from datastore.shard import FileEntry

SEQ_LEN = 256


@pytest.fixture
def dataset(tmp_path, handmade) -> Path:
    rows = [handmade.pack([handmade.document(number)], SEQ_LEN) for number in range(3)]
    handmade.write_dataset(tmp_path, {"train": [rows[:2]], "valid": [rows[2:]]}, seq_len=SEQ_LEN)
    return tmp_path


def edit(folder: Path, change) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_committed_manifest_comes_back(dataset) -> None:
    manifest = load_dataset_manifest(dataset)
    assert manifest.counts["train"].rows == 2
    assert [entry.name for entry in manifest.entries("valid")] == ["valid/shard-00000.arrow"]
    before = (dataset / "manifest.json").read_bytes()
    commit_manifest(dataset, manifest)
    assert (dataset / "manifest.json").read_bytes() == before
    assert load_dataset_manifest(dataset) == manifest


def test_layout_and_order_of_keys_do_not_matter(dataset) -> None:
    manifest = load_dataset_manifest(dataset)
    values = json.loads((dataset / "manifest.json").read_text())
    shuffled = dict(random.Random(0).sample(list(values.items()), len(values)))
    (dataset / "manifest.json").write_text(json.dumps(shuffled, indent=7))
    assert load_dataset_manifest(dataset) == manifest


def test_no_flipped_bit_gives_another_manifest(dataset, handmade) -> None:
    path = dataset / "manifest.json"
    manifest, num_bits, refused = load_dataset_manifest(dataset), path.stat().st_size * 8, 0
    for bit in range(num_bits):
        handmade.flip_bit(path, bit)
        try:
            assert load_dataset_manifest(dataset) == manifest, f"bit {bit}"
        except FormatError:
            refused += 1
        handmade.flip_bit(path, bit)
    assert refused > 0.75 * num_bits


def test_every_truncation_is_refused(dataset) -> None:
    path = dataset / "manifest.json"
    for size in reversed(range(len(path.read_bytes().rstrip()))):
        os.truncate(path, size)
        with pytest.raises(FormatError):
            load_dataset_manifest(dataset)


def test_a_folder_without_manifest_is_no_dataset(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FormatError, match=r"is no dataset.*vpmoe-data build"):
            load_dataset_manifest(folder)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_version_is_named_before_anything_else(dataset, version) -> None:
    def change(values: dict) -> None:
        values.clear()
        values["format_version"] = version

    edit(dataset, change)
    with pytest.raises(FormatError, match="another format version"):
        load_dataset_manifest(dataset)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": NaN}'])
def test_hostile_content_is_refused(dataset, content) -> None:
    (dataset / "manifest.json").write_bytes(content)
    with pytest.raises(FormatError):
        load_dataset_manifest(dataset)


def test_half_a_surrogate_is_refused(dataset) -> None:
    edit(dataset, lambda values: values.update(config={"a": "\ud800"}))
    with pytest.raises(FormatError, match="its own hash"):
        load_dataset_manifest(dataset)


def recommit(folder: Path, **changes) -> None:
    manifest = load_dataset_manifest(folder)
    commit_manifest(folder, DatasetManifest(**{**manifest.model_dump(), **changes}))


def test_a_stale_fingerprint_is_refused(dataset) -> None:
    recommit(dataset, seq_len=512)
    with pytest.raises(FormatError, match="fingerprint"):
        load_dataset_manifest(dataset)


def test_another_tokenizer_is_refused(dataset) -> None:
    tokenizer = load_dataset_manifest(dataset).tokenizer.model_dump() | {"ranks_sha256": "0" * 64}
    recommit(dataset, tokenizer=tokenizer)
    with pytest.raises(FormatError, match="another tokenizer"):
        load_dataset_manifest(dataset)


@pytest.mark.parametrize("name", ["../shard-00000.arrow", "/etc/passwd", "train/shard-00001.arrow"])
def test_a_file_with_another_name_cannot_be_listed(dataset, name) -> None:
    entry = FileEntry(name=name, rows=1, bytes=1, sha256="0" * 64)
    with pytest.raises(ValueError, match="is named"):
        recommit(dataset, files={"train": [entry]})


def test_the_fingerprint_is_of_content_alone(dataset) -> None:
    manifest = load_dataset_manifest(dataset)
    recommit(dataset, git_sha="abc", config={"workers": 3}, rejects={})
    assert load_dataset_manifest(dataset).fingerprint == manifest.fingerprint
    base = (manifest.dataset_id, manifest.seq_len, manifest.files)
    seen = {dataset_fingerprint(*base)}
    for field, value in [("rows", 9), ("bytes", 9), ("sha256", "9" * 64)]:
        changed = manifest.entries("train")[0].model_copy(update={field: value})
        seen.add(dataset_fingerprint(*base[:2], {**manifest.files, "train": (changed,)}))
    seen.add(dataset_fingerprint("ef" * 32, *base[1:]))
    seen.add(dataset_fingerprint(base[0], 512, base[2]))
    assert len(seen) == 6
    backwards = dict(reversed(manifest.files.items()))
    assert dataset_fingerprint(*base[:2], backwards) == manifest.fingerprint


def test_an_absent_target_store_is_named(dataset) -> None:
    with pytest.raises(FormatError, match=r"targets/tiny is no target store.*--teacher tiny"):
        load_target_manifest(dataset, "tiny")


@pytest.mark.parametrize("slug", ["../x", "", "A", ".hidden", "a/b"])
def test_a_slug_that_is_no_folder_name_is_refused(dataset, slug) -> None:
    with pytest.raises(ConfigError):
        load_target_manifest(dataset, slug)
