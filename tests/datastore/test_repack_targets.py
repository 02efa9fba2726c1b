"""Targets carried over to other rows: the same bits per document, and a manifest that says where they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.errors import FormatError, ResumeError
from datastore.manifest import load_target_manifest
from datastore.packing import PackConfig, pack_documents
from datastore.reader import Dataset, TargetStore
from datastore.repack import repack_dataset
from datastore.repack_targets import _Stock
from datastore.types import DocTarget, RenderedDoc
from tests.datastore.repacks import SMALL, documents
from tests.trainer.megatron.tiny import tiny_config
from trainer.data import RunData


@pytest.mark.parametrize("slug", ["tiny", "part"])
def test_every_document_and_its_targets_are_the_same_bit_by_bit(
    repack_origin, repacked, tmp_path, slug
):
    before = documents(repack_origin, slug)
    assert documents(repacked, slug) == before
    has_targets = [document[-1] is not None for document in before.values()]
    assert all(has_targets) if slug == "tiny" else 0.3 < np.mean(has_targets) < 0.7
    repack_dataset(repacked, tmp_path / "back", seq_len=256, teachers=(slug,), workers=1)
    assert documents(tmp_path / "back", slug) == before
    rows = [Dataset.open(folder).num_rows("train") for folder in (repack_origin, repacked)]
    assert rows[1] < rows[0]


@pytest.mark.parametrize("slug", ["tiny", "part"])
def test_the_target_manifest_keeps_what_it_says_of_the_teacher(repack_origin, repacked, slug):
    before, after = load_target_manifest(repack_origin, slug), load_target_manifest(repacked, slug)
    assert after.target_id != before.target_id
    assert after.origin == {
        "dataset": before.dataset_fingerprint,
        "target_id": before.target_id,
    }
    changed = {"target_id", "dataset_fingerprint", "origin", "files", "counts", "budget"}
    changed |= {"shard_budgets", "quarantine", "alignment"}
    assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert after.counts == before.counts
    assert after.alignment["positions"] > 100
    for name in ("reasoning", "final", "control"):
        was, now = before.budget[name], after.budget[name]
        assert now["positions"] == was["positions"]
        # What cannot be seen in stored targets is carried, the rest recounted from the stored steps of 1/64 nat.
        assert now["kl_mean"] == pytest.approx(was["kl_mean"], rel=1e-9)
        assert now["kl_max"] == was["kl_max"] > 0
        assert now["entries"] == was["entries"]
        assert now["entropy"] == pytest.approx(was["entropy"], rel=1e-5)
        for figure in ("head_mass", "tail_mass", "realised_logprob"):
            assert now[figure] == pytest.approx(was[figure], abs=1 / 64)


def test_quarantined_documents_are_found_at_their_new_places(repack_origin, repacked):
    (before,) = load_target_manifest(repack_origin, "part").quarantine
    (after,) = load_target_manifest(repacked, "part").quarantine
    assert (after.doc_id, after.reason) == (before.doc_id, "poison")
    dataset = Dataset.open(repacked)
    rows = list(dataset.shard_rows(after.split, after.shard))
    assert rows[after.row].doc_ids[after.document].hex() == before.doc_id


@pytest.mark.parametrize(("slug", "share"), [("tiny", 1.0), ("part", 0.5)])
def test_the_trainer_reads_it(repacked, slug, share):
    student = tiny_config().student.resolved() | {"vocab_size": 201_088}
    config = tiny_config(dataset=str(repacked), teacher=slug, student=student, kd_share=share)
    data = RunData.open(config)  # budgets and gate included
    scored = data.scored["train"].select(np.arange(4)).tolist()
    batch = data.batch("train", scored, [True] * 4)
    targets = [document for i in scored for document in read(repacked, slug, i)]
    assert int(batch.has_target_BT.sum()) == sum(
        len(document.target.positions_P) for document in targets if document
    )


def read(folder: Path, slug: str, index: int) -> list[DocTarget | None]:
    dataset = Dataset.open(folder)
    store = TargetStore.open(dataset, slug)
    return store.documents("train", index, dataset.row("train", index))


def test_targets_that_are_absent_or_damaged_stop_it(repack_origin, tmp_path):
    with pytest.raises(FormatError, match="no target store"):
        repack_dataset(repack_origin, tmp_path / "out", teachers=("absent",), workers=1)
    damaged = tmp_path / "damaged"
    shutil.copytree(repack_origin, damaged)
    shard = damaged / "targets/tiny/train/shard-00001.arrow"
    stored = bytearray(shard.read_bytes())
    stored[len(stored) // 2] ^= 1
    shard.write_bytes(stored)
    with pytest.raises(FormatError, match=r"tiny/train/shard-00001"):
        repack_dataset(damaged, tmp_path / "out", seq_len=384, workers=1)
    assert not (tmp_path / "out" / "targets/tiny/manifest.json").exists()


def test_other_targets_under_the_name_of_the_teacher_are_kept(repack_origin, repacked, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(repacked, out)
    path = out / "targets" / "tiny" / "manifest.json"
    path.unlink()
    identity = out / "targets" / "tiny" / ".work" / "identity.json"
    identity.write_text(json.dumps({"dataset": "of a scoring"}))
    with pytest.raises(ResumeError, match="other targets"):
        repack_dataset(repack_origin, out, seq_len=384, overrides=SMALL, workers=1)


def test_only_the_targets_of_a_window_are_held():
    lengths = np.random.RandomState(0).randint(10, 40, 500).tolist()
    numbered = [
        RenderedDoc(
            doc_id=number.to_bytes(16, "big"),
            tokens_T=np.zeros(length, np.int32),
            spans_T=np.ones(length, np.uint8),
            language="",
            exercise="",
        )
        for number, length in enumerate(lengths)
    ]
    read = 0

    def stored():
        nonlocal read
        for document in numbered:
            read += 1
            yield (document.doc_id, 0), None

    stock, taken = _Stock(stored()), 0
    for row in pack_documents(numbered, seq_len=64, config=PackConfig(window=32)):
        for doc_id in row.doc_ids:
            assert stock.take((doc_id, 0)) is None
            taken += 1
        assert read - taken <= 32
    assert taken == 500
    with pytest.raises(FormatError, match="not in its origin"):
        stock.take((bytes(16), 0))
