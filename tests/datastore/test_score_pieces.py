"""Tries, halves and quarantine: every document is scored or quarantined, whatever fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.budget import BudgetSums
from datastore.score_pieces import MAX_TRIES, Part, PieceHeader, Tries, read_piece, write_piece


def run(documents: int, poison: set[int]) -> tuple[Tries, int]:
    """Score a piece in which any part with a poison document fails; the tries, and how many parts failed."""
    tries, failures = Tries(parts=(Part(first=0, end=documents),)), 0
    while tries.parts:
        part = tries.parts[0]
        if poison & set(range(part.first, part.end)):
            failures += 1
            failed = part.model_copy(update={"tries": part.tries + 1, "error": "bad"})
            tries = tries.replaced(part, (failed,)).settled(documents)
        else:
            done = (*tries.done, (part.first, part.end))
            tries = tries.replaced(part, ()).model_copy(update={"done": done})
    return tries, failures


@settings(deadline=None)
@given(st.integers(1, 70), st.sets(st.integers(0, 69), max_size=4))
def test_exactly_the_poison_documents_are_quarantined(documents: int, poison: set[int]) -> None:
    poison = {number for number in poison if number < documents}
    tries, _ = run(documents, poison)
    assert set(tries.quarantine) == poison
    scored = [number for first, end in tries.done for number in range(first, end)]
    assert sorted([*scored, *poison]) == list(range(documents))


def test_one_poison_document_of_2048_costs_few_failures() -> None:
    _, failures = run(2048, {1234})
    assert failures == MAX_TRIES + 10 + MAX_TRIES  # the whole, one a halving, the document alone


def test_a_document_alone_has_all_its_tries() -> None:
    tries, failures = run(1, {0})
    assert failures == MAX_TRIES and tries.quarantine == {0: "bad, 3 times"}


@pytest.mark.parametrize("where", [0, 3, 10, -1])
def test_a_damaged_piece_is_no_piece(tmp_path: Path, where: int) -> None:
    header = PieceHeader(
        row_hashes=(1, 2, 3),
        sizes=(3, None, 2),
        documents=2,
        tokens=20,
        sums=BudgetSums(),
        quarantine=(),
        seconds=1.5,
    )
    path = tmp_path / "piece-00000.bin"
    write_piece(path, header, [b"abc", None, b"de"])
    assert read_piece(path) == (header, [b"abc", None, b"de"])
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    assert read_piece(path) is None
    path.write_bytes(content[:where])
    assert read_piece(path) is None
    assert read_piece(tmp_path / "piece-00001.bin") is None
