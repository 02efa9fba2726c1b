"""Tries, halves and quarantine: every document is scored or quarantined, whatever fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import load_config, named_config
from datastore.budget import BudgetSums
from datastore.reader import Dataset
from datastore.score_job import ScoreRun, ShardJob
from datastore.score_pieces import (
    MAX_TRIES,
    Part,
    PieceHeader,
    ShardWork,
    Tries,
    forgive,
    read_piece,
    write_piece,
)
from datastore.selection import Selection
from datastore.teacher import TeacherConfig


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


@pytest.fixture
def job(tmp_path: Path, handmade) -> tuple[ShardJob, Dataset]:
    """A shard of two rows with three documents each, in pieces of one row."""
    documents = [handmade.document(i) for i in range(6)]
    rows = [handmade.pack(documents[i : i + 3], 512) for i in (0, 3)]
    handmade.write_dataset(tmp_path, {"train": [rows], "valid": []}, seq_len=512)
    overrides = ("engine.documents_per_call=3",)
    run = ScoreRun(
        dataset=tmp_path,
        folder=tmp_path / "targets" / "tiny",
        teacher=load_config(TeacherConfig, named_config("teacher", "tiny"), overrides),
        weights={},
        versions={},
        selection=Selection(),
        target_id="",
        order_sha256="",
    )
    return ShardJob(run=run, split="train", shard=0), Dataset.open(tmp_path)


def test_tries_survive_their_process(job: tuple[ShardJob, Dataset]) -> None:
    for tries in range(MAX_TRIES):
        work = ShardWork(*job)
        assert [piece.end - piece.first for piece in work.pieces] == [1, 1]
        if tries:  # what has failed comes last
            assert work.next()[0].number == 1
        piece = work.pieces[0]
        part = Part(first=0, end=3, tries=tries, error="the process died" if tries else "")
        work.begin(piece, part)
    work = ShardWork(*job)  # the third process died as well
    work.hand_over(work.pieces[1])
    assert work.next() == (work.pieces[0], Part(first=1, end=3))
    work.begin(*work.next())
    work = ShardWork(*job)
    work.hand_over(work.pieces[1])
    halves = [Part(first=0, end=1), Part(first=1, end=2), Part(first=2, end=3)]
    for half in halves:
        assert work.next() == (work.pieces[0], half)
        work.keep(*work.next(), [np.full((2, 3), half.first, np.int32)])
    assert work.next() == (work.pieces[0], None)
    packed, quarantine = ShardWork(*job).gather(work.pieces[0])
    assert [rows.tolist() for rows in packed] == [[[n] * 3] * 2 for n in range(3)]
    assert quarantine == {}


def test_a_stop_from_outside_costs_no_try(job: tuple[ShardJob, Dataset]) -> None:
    work = ShardWork(*job)
    for _ in range(MAX_TRIES):
        work.begin(*work.next())
        forgive(job[0])
        work = ShardWork(*job)
        assert [work.next()[1].tries, work.next()[1].end] == [0, 3]


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
