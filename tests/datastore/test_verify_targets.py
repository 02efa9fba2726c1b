"""Verify holds a target store against its selection, its quarantine, its order of ids and its shards' budgets."""

import shutil
from pathlib import Path

import pytest

from datastore.manifest import QuarantinedDocument, load_target_manifest
from datastore.selection import Selection
from datastore.types import DocTarget, PackedRow, RenderedDoc
from datastore.verify import verify_dataset

SEQ_LEN = 320
# Documents by row: train shard 0 has two rows, shard 1 two, valid one. Numbers above 9 make longer documents.
ROWS = [(0, 10), (2,), (3,), (4, 11), (6,)]
LONG = Selection(min_tokens=135)
LARGE, SMALL = Selection(fraction=0.9), Selection(fraction=0.4)


def made(handmade, number: int) -> RenderedDoc:
    """Documents above 9 say more."""
    return handmade.document(number, answer="" if number > 9 else "Yes.")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, handmade) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    rows = [handmade.pack([made(handmade, n) for n in numbers], SEQ_LEN) for numbers in ROWS]
    shards = {"train": [rows[:2], rows[2:4]], "valid": [rows[4:]]}
    handmade.write_dataset(folder, shards, seq_len=SEQ_LEN)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "dataset")
    return tmp_path / "dataset"


def score(handmade, folder: Path, stored: Selection, leave_out: bytes = b"", **changes) -> None:
    """Targets of what `stored` selects, but for the document `leave_out`; the manifest states the selection."""

    def documents_of(row: PackedRow) -> list[DocTarget | None]:
        chosen = stored.documents(row)
        return [
            document if keep and doc_id != leave_out else None
            for document, keep, doc_id in zip(
                handmade.row_documents(row), chosen, row.doc_ids, strict=True
            )
        ]

    values = {"selection": stored.resolved()} | changes
    handmade.write_targets(folder, documents_of=documents_of, **values)


def found(folder: Path) -> dict[str, str]:
    return {fault.kind: str(fault) for fault in verify_dataset(folder)}


@pytest.mark.parametrize("selection", [Selection(), LONG, LARGE, SMALL])
def test_what_was_selected_is_scored_and_nothing_else(folder, handmade, selection) -> None:
    score(handmade, folder, selection)
    assert found(folder) == {}


def test_the_selections_of_these_tests_differ(handmade) -> None:
    """LONG leaves out documents within rows, the fractions whole rows."""
    rows = [handmade.pack([made(handmade, n) for n in numbers], SEQ_LEN) for numbers in ROWS]
    by_length = [LONG.documents(row).tolist() for row in rows]
    assert [False, True] in by_length or [True, False] in by_length
    large, small = ([s.documents(row).any() for row in rows] for s in (LARGE, SMALL))
    assert 0 < sum(small) < sum(large)


@pytest.mark.parametrize(
    ("stored", "stated", "message"),
    [
        (Selection(), LONG, "is scored and was not selected"),
        (LONG, Selection(), "was selected and is not scored"),
        (LARGE, SMALL, "is scored and was not selected"),
        (SMALL, LARGE, "was selected and is not scored"),
        (Selection(), Selection(languages=["fr"]), "is scored and was not selected"),
    ],
)
def test_another_selection_than_stated(folder, handmade, stored, stated, message) -> None:
    score(handmade, folder, stored, selection=stated.resolved())
    faults = found(folder)
    assert list(faults) == ["selection"]
    assert message in faults["selection"] and "targets/tiny/" in faults["selection"]


def test_a_selection_that_is_none(folder, handmade) -> None:
    score(handmade, folder, Selection(), selection={"fraction": 2})
    assert list(found(folder)) == ["target manifest"]


def test_after_a_repack_only_the_filters_can_be_told(folder, handmade) -> None:
    for stored, stated in ((Selection(), SMALL), (SMALL, LARGE)):
        score(handmade, folder, stored, selection=stated.resolved(), origin={"dataset": "x"})
        assert found(folder) == {}
    half_of_long = Selection(fraction=0.5, min_tokens=135)
    score(handmade, folder, Selection(), selection=half_of_long.resolved(), origin={"dataset": "x"})
    assert list(found(folder)) == ["selection"]


def quarantined(handmade, number: int = 11, **changes) -> QuarantinedDocument:
    """Document 1 of row 1 of train shard 1, which is number 11."""
    values = {"split": "train", "shard": 1, "row": 1, "document": 1}
    name = made(handmade, number).doc_id.hex()
    return QuarantinedDocument(**(values | {"doc_id": name, "reason": "engine died"} | changes))


def test_a_quarantined_document_is_not_scored_and_no_fault(folder, handmade) -> None:
    poison = made(handmade, 11).doc_id
    score(handmade, folder, Selection(), poison, quarantine=[quarantined(handmade)])
    assert found(folder) == {}
    score(handmade, folder, Selection(), poison)
    assert list(found(folder)) == ["selection"]


def test_a_quarantined_document_was_selected(folder, handmade) -> None:
    short = Selection(max_tokens=134)
    score(handmade, folder, short, quarantine=[quarantined(handmade)])
    assert "document 1 is quarantined and was not selected" in found(folder)["selection"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_id": "00" * 16}, "quarantined as 0000"),
        ({"document": 2}, "document 2 is quarantined and the row has 2"),
        ({"row": 0}, "the row has 1"),
        ({"row": 2}, "does not exist"),
        ({"shard": 2}, "does not exist"),
        ({"split": "valid", "shard": 0, "row": 0, "document": 0}, "quarantined as"),
        ({}, "quarantined and scored"),
    ],
)
def test_a_quarantine_of_what_is_not_there(folder, handmade, change, message) -> None:
    score(handmade, folder, Selection(), quarantine=[quarantined(handmade, **change)])
    assert message in found(folder)["quarantine"]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_the_order_of_ids_is_the_one_of_the_manifest(folder, handmade, damage) -> None:
    score(handmade, folder, Selection())
    path = folder / "targets/tiny/id_order.bin"
    if damage == "missing":
        path.unlink()
    else:
        handmade.flip_bit(path, 1000)
    faults = found(folder)
    assert list(faults) == ["target manifest"] and "id_order.bin" in faults["target manifest"]


def budgets_of(folder: Path) -> dict:
    manifest = load_target_manifest(folder, "tiny")
    return {split: [dict(b) for b in of] for split, of in manifest.shard_budgets.items()}


@pytest.mark.parametrize(
    ("figure", "change", "message"),
    [
        ("entries", 0.01, "train/shard-00001.arrow: final.entries"),
        ("positions", 1, "train/shard-00001.arrow: final.positions"),
        ("entropy", 0.01, "train/shard-00001.arrow: final.entropy"),
        ("kl_mean", 1e-6, "their sum: final.kl_mean"),
        ("kl_max", 1e-3, "their sum: final.kl_max"),
    ],
)
def test_every_figure_of_a_shard_budget(folder, handmade, figure, change, message) -> None:
    score(handmade, folder, LONG)
    budgets = budgets_of(folder)
    final = budgets["train"][1]["final"]
    budgets["train"][1]["final"] = final | {figure: final[figure] + change}
    score(handmade, folder, LONG, shard_budgets=budgets)
    faults = found(folder)
    assert list(faults) == ["shard budgets"] and message in faults["shard budgets"]


def test_a_shard_without_its_budget(folder, handmade) -> None:
    score(handmade, folder, Selection())
    budgets = budgets_of(folder)
    budgets["train"].pop()
    score(handmade, folder, Selection(), shard_budgets=budgets)
    assert "1 shard budgets for 2 shards" in found(folder)["shard budgets"]
    score(handmade, folder, Selection(), shard_budgets={})
    assert found(folder) == {}


def test_counts_are_those_of_scored_documents(folder, handmade) -> None:
    score(handmade, folder, LONG)
    counts = load_target_manifest(folder, "tiny").counts
    lengths = [len(made(handmade, n).tokens_T) for n in (0, 10, 2, 3, 4, 11)]
    kept = [length for length in lengths if length >= 135]
    assert counts["train"] == {"documents": len(kept), "tokens": sum(kept)}
    score(handmade, folder, LONG, counts=counts | {"train": {"documents": 6, "tokens": sum(kept)}})
    assert list(found(folder)) == ["target counts"]
