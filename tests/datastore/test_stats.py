"""Stats prints the dataset's own numbers."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from datastore.cli import main
from datastore.manifest import QuarantinedDocument, load_target_manifest
from datastore.reader import Dataset
from datastore.stats import document_lengths, histogram, scored_line

SEQ_LEN = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory, handmade) -> Path:
    folder = tmp_path_factory.mktemp("stats")
    pairs = [(0, 1), (2,), (3,)]
    rows = [handmade.pack([handmade.document(n) for n in pair], SEQ_LEN) for pair in pairs]
    handmade.write_dataset(folder, {"train": [rows[:2]], "valid": [rows[2:]]}, seq_len=SEQ_LEN)
    handmade.write_targets(folder)
    return folder


def test_counts_lengths_and_budget_are_printed(folder, handmade) -> None:
    result = CliRunner().invoke(main, ["stats", str(folder)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    counts = Dataset.open(folder).manifest.counts["train"]
    (train,) = [line.split() for line in lines if line.split()[:1] == ["train"]]
    assert train[1:5] == ["1", "2", "3", f"{counts.tokens:,}"]
    assert "empty_query 2" in result.stdout
    assert "4 documents of 3 of 3 rows" in result.stdout
    assert "scored: 4 of 4 documents (100.0%)" in result.stdout
    budget = load_target_manifest(folder, "tiny").budget
    (final,) = [line.split() for line in lines if line.split()[:1] == ["final"]]
    assert float(final[1]) == budget["final"]["positions"]
    assert float(final[-1]) == pytest.approx(budget["final"]["entropy"], rel=1e-3)


def test_what_was_selected_and_scored_is_one_line(folder, handmade) -> None:
    half = {"fraction": 0.5, "languages": ["en"], "exercises": [], "min_tokens": None}
    manifest = load_target_manifest(folder, "tiny")
    assert scored_line(manifest, 4) == "scored: 4 of 4 documents (100.0%)"
    poison = {"split": "train", "shard": 0, "row": 0, "document": 0, "doc_id": "", "reason": ""}
    part = manifest.model_copy(
        update={"selection": half, "quarantine": (QuarantinedDocument(**poison),)}
    )
    assert scored_line(part, 16) == (
        "scored: 4 of 16 documents (25.0%); fraction 0.5; languages ['en']; quarantined: 1"
    )


def test_lengths_are_those_of_the_documents(folder, handmade) -> None:
    lengths, rows = document_lengths(Dataset.open(folder), 100)
    assert rows == 3
    assert lengths.tolist() == [len(handmade.document(n).tokens_T) for n in range(4)]
    assert document_lengths(Dataset.open(folder), 1)[1] == 2


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 20))
def test_the_histogram_counts_every_length_once(lengths: list[int], bins: int) -> None:
    ranges = histogram(np.array(lengths), bins)
    assert len(ranges) <= bins
    assert [sum(first <= n <= last for n in lengths) for first, last, _ in ranges] == [
        count for _, _, count in ranges
    ]
    assert sum(count for _, _, count in ranges) == len(lengths)


def test_a_dataset_without_targets_or_valid_rows(tmp_path, handmade) -> None:
    rows = [handmade.pack([handmade.document(0)], SEQ_LEN)]
    handmade.write_dataset(tmp_path, {"train": [rows], "valid": []}, seq_len=SEQ_LEN)
    result = CliRunner().invoke(main, ["stats", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "targets of" not in result.stdout
