"""The link to the teacher against a real server: who is accepted, and what is scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from common.errors import AlignmentError, ConfigError, EngineError, FormatError
from datastore.alignment import MIN_POSITIONS
from datastore.harmony import Renderer
from datastore.reader import Dataset
from tests.datastore.conftest import three_a_row
from tests.datastore.served import Served
from tests.trainer.opd.bigram_engine import BigramEngine
from tests.trainer.opd.links import (
    DOCUMENTS,
    RENDER,
    asked,
    assert_scored,
    linked,
    raised,
    shard_of,
    taken,
)
from tests.trainer.opd.links import impatient as impatient
from tests.trainer.opd.served import (
    served_teacher,
)
from trainer.opd.teacher import gate_documents
from trainer.opd.teacher_identity import STABLE_KEYS, longest_shown


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with served_teacher() as server:
        yield server


def test_shards_come_back_whole_and_in_order(served) -> None:
    with linked(served.url) as link:
        assert tuple(link.open()) == STABLE_KEYS
        assert link.take() is None and link.trouble() is None
        for shard in range(5):
            link.submit(shard, shard_of(shard))
        for shard in range(5):
            number, targets = taken(link)
            assert number == shard
            assert_scored(targets, shard_of(shard))
        assert link.take() is None
        figures = link.figures()
        assert (figures.shards, figures.documents, figures.requests) == (5, 15, 5)
        lengths = [len(d.tokens_T) for shard in range(5) for d in shard_of(shard)]
        assert figures.tokens == sum(lengths)
        assert figures.request_sec > 0 and figures.away_sec == 0


def test_shards_beyond_the_limits_go_in_parts() -> None:
    with served_teacher(limits=("max_documents=2",)) as server, linked(server.url) as link:
        link.open()
        documents = [asked(number) for number in range(7)]
        link.submit(0, documents)
        _, targets = taken(link)
        assert_scored(targets, documents)
        assert link.figures().requests == 4


def test_an_empty_shard_and_a_document_without_targets(served) -> None:
    nothing = replace(asked(0), spans_T=np.zeros(len(asked(0).tokens_T), np.uint8))
    with linked(served.url) as link:
        link.open()
        link.submit(0, [])
        link.submit(1, [nothing])
        assert taken(link) == (0, [])
        assert len(taken(link)[1][0].positions_P) == 0


def test_the_gate_passes_on_the_documents_of_the_dataset(served, tmp_path) -> None:
    dataset = Dataset.open(three_a_row(tmp_path / "data", seq_len=512))
    documents = gate_documents(dataset, 5)
    assert len({document.content_key() for document in documents}) == 5
    opening = dataset.row("train", 0)
    np.testing.assert_array_equal(documents[0].tokens_T, opening.tokens_T[: opening.doc_ends_D[0]])
    assert len(gate_documents(dataset, 99)) == dataset.num_rows("train")
    with linked(served.url) as link:
        link.open()
        report = link.gate(documents)
    assert report.documents == 5 and report.positions >= MIN_POSITIONS


def test_the_gate_refuses_a_teacher_that_answers_for_another_place(monkeypatch) -> None:
    honest = BigramEngine.packed

    def late(self: BigramEngine, request):
        return np.roll(honest(self, request), 1, axis=0)

    monkeypatch.setattr(BigramEngine, "packed", late)
    with served_teacher() as server, linked(server.url) as link:
        link.open()
        with pytest.raises(AlignmentError, match="do not fit their tokens"):
            link.gate([asked(number) for number in range(8)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "other"}, "got teacher other; expected teacher bigram"),
        (
            {"tokenizer": {"name": "o200k_harmony", "ranks_sha256": "0f", "vocab_size": 7}},
            r"tokenizer\.ranks_sha256 0f, tokenizer\.vocab_size 7; expected .*446a9538",
        ),
        ({"temperature": 0.7}, r"temperature 0\.7; expected temperature 1\.0"),
        ({"canary": {"skipped": "random weights"}}, "canary {'skipped': 'random weights'}"),
        ({"canary": None}, "canary None; expected canary figures of a passed one"),
    ],
)
def test_a_teacher_that_cannot_teach_this_run_is_refused(changes, said) -> None:
    with (
        served_teacher(**changes) as server,
        linked(server.url) as link,
        pytest.raises(ConfigError, match=said),
    ):
        link.open()


def test_a_teacher_that_takes_no_document_of_the_run_is_refused(served) -> None:
    with linked(served.url, seq_len=4096) as link:
        link.open()
    refused = pytest.raises(ConfigError, match="document_tokens 4,096; expected at least 4,097")
    with linked(served.url, seq_len=4097) as link, refused:
        link.open()


def test_the_longest_shown_document_has_the_teachers_own_system_text() -> None:
    system = {
        "identity": "You are a teacher with a long introduction of many words.",
        "reasoning": None,
    }
    texts = [
        RENDER.model_copy(update={"identity": system["identity"], "reasoning": effort})
        for effort in ("low", "medium", "high")
    ]
    grown = max(len(Renderer(text).prefix_T) for text in texts) - len(Renderer(RENDER).prefix_T)
    assert grown > 0 and longest_shown(RENDER, system, 100) == 100 + grown
    assert longest_shown(RENDER, {"identity": "I", "reasoning": None}, 100) == 100


def test_the_token_is_that_of_the_variable(monkeypatch) -> None:
    with served_teacher(token="a long secret") as server:
        for given in (None, "wrong"):
            if given:
                monkeypatch.setenv("LINK_TOKEN", given)
            refused = pytest.raises(ConfigError, match="status 401: a bearer token is needed")
            with linked(server.url, token_env="LINK_TOKEN") as link, refused:
                link.open()
        monkeypatch.setenv("LINK_TOKEN", "a long secret")
        with linked(server.url, token_env="LINK_TOKEN") as link:
            assert link.open()["teacher"] == "bigram"


@pytest.mark.parametrize("number", [0, 4])
def test_a_document_that_the_teacher_cannot_score_is_named(served, number) -> None:
    documents = [asked(n) for n in range(5)]
    tokens_T = documents[number].tokens_T.copy()
    tokens_T[-1] = BigramEngine.poison
    documents[number] = replace(documents[number], tokens_T=tokens_T)
    with linked(served.url) as link:
        link.open()
        link.submit(6, documents)
        error = raised(link)
    assert isinstance(error, EngineError)
    assert f"shard 6, rollout {number}: the teacher cannot score it" in str(error)
    assert "NaN in a document" in str(error)


def test_a_malformed_document_is_named(served) -> None:
    with linked(served.url) as link:
        link.open()
        foreign = replace(asked(1), tokens_T=asked(1).tokens_T[::-1].copy(), reasoning="low")
        link.submit(2, [asked(0), foreign])
        assert "shard 2, rollout 1: the teacher cannot score it" in str(raised(link))
        spans_T = np.ones(len(asked(0).tokens_T), np.uint8)
        with pytest.raises(FormatError, match=r"shard 3, rollout 0: .*first token is a target"):
            link.submit(3, [replace(asked(0), spans_T=spans_T)])


def test_a_failure_of_one_request_alone_is_scored_again(served, monkeypatch) -> None:
    """The engine gives NaN in one batch and numbers in the next, as a kernel may: the numbers are taken."""
    honest, failed = BigramEngine.packed, []

    def packed(self: BigramEngine, request):
        rows = honest(self, request)
        if not failed:
            failed.append(True)
            raise_later(self)
        return rows

    def raise_later(engine: BigramEngine) -> None:
        engine.poison = int(DOCUMENTS[1].tokens_T[0])  # every document of the running step holds it

    step = BigramEngine.step

    def healing(self: BigramEngine):
        finished = step(self)
        self.__dict__.pop("poison", None)
        return finished

    monkeypatch.setattr(BigramEngine, "packed", packed)
    monkeypatch.setattr(BigramEngine, "step", healing)
    with linked(served.url) as link:
        link.open()
        documents = [asked(n) for n in range(4)]
        link.submit(0, documents)
        assert_scored(taken(link)[1], documents)
        assert link.figures().requests == 4
