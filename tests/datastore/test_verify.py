"""Verify: silent on a whole dataset, and for each thing that can be wrong, a fault that names it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from datastore import codec
from datastore.checks import check_document, check_padding, duplicate_documents
from datastore.cli import main
from datastore.faults import Fault, Faults, verify_file
from datastore.id_order import IdOrder
from datastore.manifest import (
    DatasetManifest,
    commit_manifest,
    dataset_fingerprint,
    load_dataset_manifest,
)
from datastore.shard import write_token_shard
from datastore.types import DocTarget, PackedRow, TargetSums
from datastore.verify import verify_dataset

SEQ_LEN = 320


@pytest.fixture(scope="module")
def rows(handmade) -> list[PackedRow]:
    pairs = [(0, 1), (2,), (3,), (4, 5), (6,)]
    return [handmade.pack([handmade.document(n) for n in pair], SEQ_LEN) for pair in pairs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, handmade, rows) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    shards = {"train": [rows[:2], rows[2:4]], "valid": [rows[4:]]}
    handmade.write_dataset(folder, shards, seq_len=SEQ_LEN)
    handmade.write_targets(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "dataset")
    return tmp_path / "dataset"


def kinds(folder: Path) -> list[str]:
    return [fault.kind for fault in verify_dataset(folder)]


def rewritten(handmade, folder: Path, change, shards=None) -> list[Fault]:
    """The faults of a dataset whose first row was changed before the real writer hashed it; no targets."""
    manifest = load_dataset_manifest(folder)
    rows = [handmade.pack([handmade.document(n) for n in pair], SEQ_LEN) for pair in [(0, 1), (2,)]]
    tokens, spans = rows[0].tokens_T.copy(), rows[0].spans_T.copy()
    change(tokens, spans, rows[0].doc_ends_D)
    rows[0] = dataclasses.replace(rows[0], tokens_T=tokens, spans_T=spans)
    shutil.rmtree(folder)
    handmade.write_dataset(folder, {"train": [rows], "valid": []}, seq_len=manifest.seq_len)
    return verify_dataset(folder)


def test_a_whole_dataset_has_no_fault(folder) -> None:
    assert verify_dataset(folder) == []


def test_workers_do_not_change_the_faults(folder, handmade) -> None:
    assert verify_dataset(folder, workers=2) == []
    for name in ("train/shard-00001", "train/shard-00000", "targets/tiny/valid/shard-00000"):
        path = folder / f"{name}.arrow"
        handmade.flip_bit(path, 8 * (path.stat().st_size // 2))
    faults = verify_dataset(folder, workers=1)
    assert {fault.count for fault in faults if fault.kind == "file sha256"} == {3}
    assert verify_dataset(folder, workers=3) == faults


def test_the_command_exits_0_with_one_line_and_1_with_the_faults(folder, handmade) -> None:
    good = CliRunner().invoke(main, ["verify", str(folder)])
    assert good.exit_code == 0
    (line,) = good.stdout.splitlines()
    assert "5 rows" in line and "7 documents" in line and "tiny" in line
    handmade.flip_bit(folder / "train/shard-00001.arrow", 16_000)
    bad = CliRunner().invoke(main, ["verify", str(folder)])
    assert bad.exit_code == 1
    assert "train/shard-00001.arrow" in bad.stdout


@pytest.mark.parametrize("name", ["train/shard-00001", "targets/tiny/valid/shard-00000"])
def test_any_flipped_bit_is_a_fault(folder, handmade, name) -> None:
    path = folder / f"{name}.arrow"
    for bit in np.random.default_rng(0).choice(path.stat().st_size * 8, 40, replace=False):
        handmade.flip_bit(path, int(bit))
        faults = {fault.kind: fault for fault in verify_dataset(folder)}
        assert faults["file sha256"].file == f"{name}.arrow"
        handmade.flip_bit(path, int(bit))


def test_every_flipped_bit_of_a_small_shard_is_a_fault(tmp_path, handmade) -> None:
    rng = np.random.default_rng(0)
    shards = {"train": [[handmade.random_row(rng, 4)]], "valid": []}
    (entry,) = handmade.write_dataset(tmp_path, shards, seq_len=4).entries("train")
    path = tmp_path / "train/shard-00000.arrow"

    def file_faults() -> list[str]:
        faults = Faults()
        verify_file(tmp_path, entry, "", faults)
        return [fault.kind for fault in faults.found()]

    assert file_faults() == []
    for bit in range(path.stat().st_size * 8):
        handmade.flip_bit(path, bit)
        assert file_faults() == ["file sha256"], bit
        handmade.flip_bit(path, bit)


def test_a_damaged_row_is_named_with_its_number(folder, handmade) -> None:
    path = folder / "train/shard-00001.arrow"
    content = path.read_bytes()
    row = np.array(load_rows(path)[1]["tokens"], np.int32).tobytes()
    handmade.flip_bit(path, 8 * (content.index(row) + 500))
    faults = {fault.kind: fault for fault in verify_dataset(folder)}
    assert set(faults) == {"file sha256", "row"}
    assert (faults["row"].file, faults["row"].row) == ("train/shard-00001.arrow", 1)


def load_rows(path: Path) -> list[dict]:
    import pyarrow as pa

    return pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all().to_pylist()


def test_missing_short_and_unlisted_files(folder) -> None:
    (folder / "train/shard-00000.arrow").unlink()
    path = folder / "valid/shard-00000.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    shutil.copy(folder / "train/shard-00001.arrow", folder / "train/shard-00002.arrow")
    faults = {fault.kind: fault for fault in verify_dataset(folder)}
    assert faults["missing file"].file == "train/shard-00000.arrow"
    assert faults["file size"].file == "valid/shard-00000.arrow"
    assert faults["unlisted file"].file == "train/shard-00002.arrow"
    assert faults["shard"].count == 2


def test_exchanged_files(folder) -> None:
    one, other = (folder / f"train/shard-0000{n}.arrow" for n in (0, 1))
    assert one.stat().st_size == other.stat().st_size
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    faults = {fault.kind: fault for fault in verify_dataset(folder)}
    assert faults["file sha256"].count == 2
    assert faults["shard"].count == 2
    assert "vpmoe.shard" in faults["shard"].message


def test_a_folder_without_manifest(tmp_path) -> None:
    assert kinds(tmp_path) == ["manifest"]


def test_a_manifest_edited_by_hand(folder) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"empty_query": 2', '"empty_query": 3'))
    assert kinds(folder) == ["manifest"]


def recommit(folder: Path, change) -> None:
    """Commit again, with a right self hash, what `change` makes of the manifest's values."""
    values = load_dataset_manifest(folder).model_dump()
    change(values)
    commit_manifest(folder, DatasetManifest(**values))


@pytest.mark.parametrize("field", ["rows", "documents", "tokens", "control_targets", "padding"])
def test_counts_that_are_not_those_of_the_rows(folder, field) -> None:
    def change(values: dict) -> None:
        values["counts"]["train"][field] += 1

    recommit(folder, change)
    (fault,) = verify_dataset(folder)
    assert (fault.kind, fault.file) == ("counts", "manifest.json")


def test_padding_must_be_padding(handmade, folder) -> None:
    def change(tokens, spans, ends):
        tokens[-1] = 5

    (fault,) = rewritten(handmade, folder, change)
    assert (fault.kind, fault.file, fault.row) == ("padding", "train/shard-00000.arrow", 0)


@pytest.mark.parametrize("position", [0, 100, 108, 125, -2, -1])
def test_every_span_is_checked(handmade, folder, position) -> None:
    def change(tokens, spans, ends):
        where = position if position >= 0 else int(ends[0]) + position
        spans[where] = (spans[where] + 1) % 3

    faults = rewritten(handmade, folder, change)
    assert [fault.kind for fault in faults] == ["document"]
    assert "document 0" in faults[0].message


def test_a_document_that_is_not_harmony(handmade, folder) -> None:
    def change(tokens, spans, ends):
        tokens[ends[0] - 2] = 200_007

    faults = rewritten(handmade, folder, change)
    assert [fault.kind for fault in faults] == ["document"]


def test_every_position_of_a_document_is_watched(handmade) -> None:
    """Any other span anywhere, and any control id anywhere inside, is a fault of the document."""
    document = handmade.document(1)
    check_document(document.tokens_T, document.spans_T)
    for position in range(len(document.tokens_T)):
        for tag in {0, 1, 2, 3} - {int(document.spans_T[position])}:
            spans = document.spans_T.copy()
            spans[position] = tag
            with pytest.raises(Exception, match="span of token"):
                check_document(document.tokens_T, spans)
        for control in {199_999, 200_002, 200_006} - {int(document.tokens_T[position])}:
            tokens = document.tokens_T.copy()
            tokens[position] = control
            with pytest.raises(Exception, match="expected"):
                check_document(tokens, document.spans_T)


def test_padding_span(handmade) -> None:
    row = handmade.pack([handmade.document(1)], SEQ_LEN)
    check_padding(row)
    row.spans_T[-1] = 1
    with pytest.raises(Exception, match=f"position {SEQ_LEN - 1} is padding"):
        check_padding(row)


def test_a_document_that_comes_twice(handmade, tmp_path, rows) -> None:
    shards = {"train": [rows[:2]], "valid": [[rows[1]]]}
    handmade.write_dataset(tmp_path, shards, seq_len=SEQ_LEN)
    (fault,) = verify_dataset(tmp_path)
    assert fault.kind == "duplicate document"
    assert (fault.file, fault.row) == ("valid/shard-00000.arrow", 0)
    assert rows[1].doc_ids[0].hex() in fault.message


def test_duplicates_are_found_among_many() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, (3000, 2), dtype=np.uint64).astype(">u8")
    seen, repeats = set(), []
    for number, pair in enumerate(map(tuple, ids.tolist())):
        if pair in seen:
            repeats.append(number)
        seen.add(pair)
    assert duplicate_documents(ids.tobytes()).tolist() == repeats
    assert duplicate_documents(b"").tolist() == []


def test_a_rebuilt_shard_under_an_old_manifest(folder, handmade, rows) -> None:
    manifest = load_dataset_manifest(folder)
    write_token_shard(
        folder,
        rows[1::-1],
        dataset_id=manifest.dataset_id,
        split="train",
        shard=0,
        seq_len=SEQ_LEN,
    )
    assert "file sha256" in kinds(folder)


def test_targets_of_another_dataset(folder) -> None:
    def change(values: dict) -> None:
        values["seq_len"] = SEQ_LEN
        values["dataset_id"] = "ef" * 32
        values["fingerprint"] = dataset_fingerprint("ef" * 32, SEQ_LEN, manifest.files)

    manifest = load_dataset_manifest(folder)
    recommit(folder, change)
    assert "target manifest" in kinds(folder)


def with_other_targets(handmade, folder: Path, change) -> list[Fault]:
    """The faults of targets in which `change` replaced each document's, written by the real writer."""

    def documents_of(row: PackedRow) -> list[DocTarget]:
        return [change(document) for document in handmade.row_documents(row)]

    handmade.write_targets(folder, documents_of=documents_of)
    return verify_dataset(folder)


def test_targets_of_other_text(handmade, folder) -> None:
    """The answer of another document of the same shape, where nothing but the content key differs."""
    row = handmade.pack([handmade.document(9)], SEQ_LEN)
    blob = codec.encode_blob(handmade.row_documents(row), row, IdOrder.identity())
    faults = foreign_blob(folder, handmade, blob)
    assert [fault.kind for fault in faults] == ["alignment of targets"]
    assert (faults[0].file, faults[0].row) == ("targets/tiny/valid/shard-00000.arrow", 0)
    assert "content key" in faults[0].message


def foreign_blob(folder: Path, handmade, blob: bytes) -> list[Fault]:
    """The faults when the one valid row carries another blob, rightly hashed and listed."""
    from datastore.manifest import TargetManifest, load_target_manifest, target_folder
    from datastore.reader import Dataset
    from datastore.shard import write_target_shard

    manifest = load_target_manifest(folder, "tiny")
    row = Dataset.open(folder).row("valid", 0)
    entry = write_target_shard(
        target_folder(folder, "tiny"),
        [(row.row_hash, blob)],
        target_id=manifest.target_id,
        split="valid",
        shard=0,
    )
    values = manifest.model_dump()
    values["files"]["valid"] = [entry]
    commit_manifest(target_folder(folder, "tiny"), TargetManifest(**values))
    return verify_dataset(folder)


def test_a_blob_that_cannot_be_decoded(handmade, folder) -> None:
    faults = foreign_blob(folder, handmade, b"not a blob")
    assert [fault.kind for fault in faults] == ["targets"]


def test_entropy_sums_that_the_budget_does_not_state(handmade, folder) -> None:
    def change(document: DocTarget) -> DocTarget:
        sums = TargetSums(reasoning=1.0, final=2.0, control=0.5)
        return dataclasses.replace(document, entropy_sums=sums)

    faults = with_other_targets(handmade, folder, change)
    assert [fault.kind for fault in faults] == ["budget", "shard budgets"]
    assert "entropy" in faults[0].message


@pytest.mark.parametrize(
    "figure, change",
    [
        ("positions", 1),
        ("entries", 0.01),
        ("head_mass", -0.05),
        ("tail_mass", 0.01),
        ("realised_logprob", -0.05),
        ("entropy", 0.01),
    ],
)
def test_every_figure_of_the_budget_is_recounted(folder, handmade, figure, change) -> None:
    from datastore.manifest import load_target_manifest

    budget = load_target_manifest(folder, "tiny").budget
    budget["final"][figure] += change
    handmade.write_targets(folder, budget=budget)
    fault, of_sum = verify_dataset(folder)
    assert (fault.kind, of_sum.kind) == ("budget", "shard budgets")
    assert f"final.{figure}" in fault.message and f"final.{figure}" in of_sum.message


def test_counts_of_targets_are_recounted(folder, handmade) -> None:
    handmade.write_targets(folder, counts={"train": {"documents": 6, "tokens": 1}})
    (fault,) = verify_dataset(folder)
    assert fault.kind == "target counts"


def test_an_unfinished_stage_is_no_fault(folder) -> None:
    (folder / "targets/late/.work").mkdir(parents=True)
    (folder / ".work").mkdir()
    (folder / ".work/state.json").write_text(json.dumps({}))
    assert verify_dataset(folder) == []
