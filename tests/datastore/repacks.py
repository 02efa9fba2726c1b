"""A dataset with the targets of two teachers, the same repacked, and all that is stored of their documents."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.files import sha256_file
from datastore.manifest import QuarantinedDocument
from datastore.reader import Dataset, TargetStore
from datastore.repack import repack_dataset
from datastore.selection import Selection
from datastore.types import SPLITS, DocTarget
from datastore.verify import verify_dataset

SELECTION = Selection(fraction=0.7, min_tokens=60)
SMALL = ("pack.window=40",)


@pytest.fixture(scope="session")
def repack_origin(small_dataset, handmade, tmp_path_factory) -> Path:
    """Rows of 256 tokens with the targets of two teachers: `tiny` scored all, `part` a part, one document in vain."""
    folder = tmp_path_factory.mktemp("origin") / "dataset"
    shutil.copytree(small_dataset, folder)
    handmade.write_targets(folder)
    dataset = Dataset.open(folder)
    split, index, number = next(
        (split, index, int(chosen[0]))
        for split in reversed(SPLITS)
        for index in range(dataset.num_rows(split))
        if len(chosen := np.flatnonzero(SELECTION.documents(dataset.row(split, index)))) > 1
    )
    shard, row = dataset.locate(split, index)
    failed = dataset.row(split, index).doc_ids[number]

    def documents_of(packed):
        chosen_D = SELECTION.documents(packed)
        return [
            document if chosen and doc_id != failed else None
            for document, chosen, doc_id in zip(
                handmade.row_documents(packed), chosen_D, packed.doc_ids, strict=True
            )
        ]

    quarantined = QuarantinedDocument(
        split=split, shard=shard, row=row, document=number, doc_id=failed.hex(), reason="poison"
    )
    handmade.write_targets(
        folder,
        slug="part",
        documents_of=documents_of,
        selection=SELECTION.resolved(),
        quarantine=(quarantined,),
    )
    assert verify_dataset(folder, workers=1) == []
    return folder


@pytest.fixture(scope="session")
def repacked(repack_origin, tmp_path_factory) -> Path:
    """The same documents in rows of 384 tokens."""
    out = tmp_path_factory.mktemp("repacked") / "out"
    repack_dataset(repack_origin, out, seq_len=384, overrides=SMALL, workers=1)
    return out


def values(target: DocTarget | None) -> tuple | None:
    """Every bit of a document's targets."""
    if target is None:
        return None
    stored = dataclasses.asdict(target.target)
    arrays = [v.tobytes() if isinstance(v, np.ndarray) else v for v in stored.values()]
    return (target.content_key, *arrays, *dataclasses.astuple(target.entropy_sums))


def documents(folder: Path, slug: str) -> dict[bytes, tuple]:
    """All that is stored of each document, by its id: split, tokens, spans, labels, targets."""
    dataset = Dataset.open(folder)
    store, found = TargetStore.open(dataset, slug), {}
    for split in SPLITS:
        for index in range(dataset.num_rows(split)):
            row = dataset.row(split, index)
            targets = store.documents(split, index, row) or [None] * len(row.doc_ids)
            labels = zip(row.languages, row.exercises, strict=True)
            parts = zip(row.documents(), row.doc_ids, labels, targets, strict=True)
            for place, doc_id, label, target in parts:
                assert doc_id not in found
                tokens, spans = row.tokens_T[place].tobytes(), row.spans_T[place].tobytes()
                found[doc_id] = (split, tokens, spans, label, values(target))
    return found


def content(folder: Path) -> dict[str, object]:
    """The hash of every file that is not state of the work; the dataset's manifest without the code's revision."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["git_sha"], manifest["self_sha256"]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hashes: dict[str, object] = {
        str(path.relative_to(folder)): sha256_file(path)
        for path in files
        if path.parent.name != ".work"
    }
    return hashes | {"manifest.json": manifest}
