"""A link to a teacher of the tests, what it is asked and what it must give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

from datastore.harmony import Reasoning, RenderConfig
from datastore.prompt import Prefix
from datastore.scoring_client import ScoreDocument
from datastore.types import SparseTarget
from tests.datastore.waiting import wait_until
from tests.trainer.opd.served import (
    bigram_teacher,
    handmade_documents,
)
from trainer.opd import teacher as teacher_module
from trainer.opd.config import TeacherServerConfig
from trainer.opd.teacher import TeacherLink

RENDER = RenderConfig()
DOCUMENTS = handmade_documents(24)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "_LONGEST_PAUSE_SEC", 0.3)
    monkeypatch.setattr(teacher_module, "_LONGEST_RETRY_SEC", 0.3)
    monkeypatch.delenv("VPMOE_TOKEN", raising=False)


@contextlib.contextmanager
def linked(url: str, seq_len: int = 512, name: str = "bigram", **keys) -> Iterator[TeacherLink]:
    config = TeacherServerConfig(name=name, url=url, **keys)
    link = TeacherLink(config, RENDER, seq_len=seq_len)
    try:
        yield link
    finally:
        link.close()


def asked(number: int, reasoning: Reasoning | None = None) -> ScoreDocument:
    made = DOCUMENTS[number % len(DOCUMENTS)]
    return ScoreDocument(tokens_T=made.tokens_T, spans_T=made.spans_T, reasoning=reasoning)


def shard_of(number: int) -> list[ScoreDocument]:
    return [asked(3 * number + i, effort) for i, effort in enumerate((None, "low", "high"))]


def taken(link: TeacherLink) -> tuple[int, list[SparseTarget]]:
    """The next shard, waited for."""
    found: list[tuple[int, list[SparseTarget]]] = []

    def comes() -> bool:
        if (shard := link.take()) is not None:
            found.append(shard)
        return bool(found)

    wait_until(comes, 60)
    return found[0]


def raised(link: TeacherLink) -> Exception:
    """What `take` raises, waited for."""
    errors: list[Exception] = []

    def comes() -> bool:
        try:
            assert link.take() is None
        except Exception as error:
            errors.append(error)
        return bool(errors)

    wait_until(comes, 60)
    return errors[0]


def assert_scored(targets: list[SparseTarget], documents: list[ScoreDocument]) -> None:
    """The bigram teacher's own targets, made without a server; it does not depend on the effort."""
    teacher = bigram_teacher()
    for found, scored in zip(targets, documents, strict=True):
        expected = teacher.target(Prefix.none().request(scored.tokens_T, scored.spans_T))
        np.testing.assert_array_equal(found.positions_P, expected.positions_P)
        np.testing.assert_array_equal(found.ids_E, expected.ids_E)
        np.testing.assert_array_equal(found.realised_logprob_P, expected.realised_logprob_P)
