"""The link to the teacher against real servers: who is accepted, what is scored, and what a lost server costs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from common.errors import AlignmentError, ConfigError, EngineError, FormatError
from datastore.alignment import MIN_POSITIONS
from datastore.harmony import Reasoning, RenderConfig, Renderer
from datastore.prompt import Prefix
from datastore.reader import Dataset
from datastore.scoring_client import ScoreDocument
from datastore.types import Reasoning, SparseTarget
from tests.datastore.conftest import three_a_row
from tests.datastore.served import Served
from tests.datastore.waiting import wait_until
from tests.trainer.opd.bigram_engine import BigramEngine
from tests.trainer.opd.served import (
    ServerProcess,
    bigram_teacher,
    free_port,
    handmade_documents,
    served_teacher,
)
from trainer.opd import teacher as teacher_module
from trainer.opd.config import TeacherServerConfig
from trainer.opd.teacher import TeacherLink, gate_documents
from trainer.opd.teacher_identity import STABLE_KEYS, longest_shown

RENDER = RenderConfig()
DOCUMENTS = handmade_documents(24)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "_LONGEST_PAUSE_SEC", 0.3)
    monkeypatch.setattr(teacher_module, "_LONGEST_RETRY_SEC", 0.3)
    monkeypatch.delenv("VPMOE_TOKEN", raising=False)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with served_teacher() as server:
        yield server


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

    wait_until(comes)
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

    wait_until(comes)
    return errors[0]


def assert_scored(targets: list[SparseTarget], documents: list[ScoreDocument]) -> None:
    """The bigram teacher's own targets, made without a server; it does not depend on the effort."""
    teacher = bigram_teacher()
    for found, scored in zip(targets, documents, strict=True):
        expected = teacher.target(Prefix.none().request(scored.tokens_T, scored.spans_T))
        np.testing.assert_array_equal(found.positions_P, expected.positions_P)
        np.testing.assert_array_equal(found.ids_E, expected.ids_E)
        np.testing.assert_array_equal(found.realised_logprob_P, expected.realised_logprob_P)


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


def test_require_compares_with_the_teacher_of_the_buffer(served) -> None:
    with linked(served.url) as link:
        identity = link.open()
        link.require(identity)
        with pytest.raises(AlignmentError, match=r"got threshold 0\.02; expected threshold 0\.01"):
            link.require(identity | {"threshold": 0.01})


def test_a_server_that_is_absent_at_open_is_waited_for(caplog) -> None:
    port, asks = free_port(), []
    opened = threading.Event()

    def poll() -> None:
        asks.append(link.trouble())
        if any(asks):
            opened.set()

    with contextlib.ExitStack() as stack, caplog.at_level("INFO"):
        link = stack.enter_context(linked(f"http://127.0.0.1:{port}"))

        def serve_later() -> None:
            assert opened.wait(30)
            stack.enter_context(served_teacher(port=port))

        starter = threading.Thread(target=serve_later)
        starter.start()
        assert link.open(poll)["teacher"] == "bigram"
        starter.join(30)
        told = [line for line in asks if line]
        assert "does not answer for 0 s (ConnectError: " in told[0]
        assert link.trouble() is None and link.figures().away_sec > 0
        link.close()
    assert any("; waiting" in message for message in caplog.messages)
    assert any("answers again" in message for message in caplog.messages)


def test_what_poll_raises_ends_the_wait() -> None:
    class Stopped(Exception): ...

    def poll() -> None:
        raise Stopped

    with linked(f"http://127.0.0.1:{free_port()}") as link, pytest.raises(Stopped):
        link.open(poll)


def test_a_full_queue_is_waited_for() -> None:
    with served_teacher(queue_tokens=4300) as server, linked(server.url) as link:
        link.open()
        server.engine.open.clear()
        with linked(server.url) as other:
            other.open()
            long = ScoreDocument(
                tokens_T=np.concatenate([Renderer(RENDER).prefix_T, np.full(4000, 99, np.int32)]),
                ranges_R2=np.array([[2000, 2001]], np.int32),
            )
            other.submit(0, [long])
            wait_until(lambda: server.queue.figures().tokens_in_flight > 4000)
            documents = [asked(number) for number in range(5)]
            link.submit(0, documents)
            wait_until(lambda: link.trouble() is not None)
            assert "is busy for" in str(link.trouble()) and "queue is full" in str(link.trouble())
            assert link.take() is None
            server.engine.open.set()
            assert_scored(taken(link)[1], documents)
            assert link.trouble() is None and link.figures().away_sec > 0
            taken(other)


@pytest.mark.slow
def test_a_server_killed_in_a_request_costs_nothing() -> None:
    """SIGKILL while it scores, then the same command on the same port: every shard once, in order."""
    with ServerProcess("--seconds", "0.3") as server, linked(server.url) as link:
        link.open()
        shards = {shard: shard_of(shard) for shard in range(4)}
        for shard, documents in shards.items():
            link.submit(shard, documents)
        answered = [taken(link)]
        server.kill()
        wait_until(lambda: "does not answer" in str(link.trouble()))
        assert link.take() is None
        server.start()
        answered += [taken(link) for _ in range(3)]
        for (number, targets), shard in zip(answered, shards, strict=True):
            assert number == shard
            assert_scored(targets, shards[shard])
        assert link.take() is None and link.trouble() is None
        assert link.figures().documents == 12


@pytest.mark.slow
def test_another_teacher_on_the_same_port_is_refused() -> None:
    with ServerProcess() as server, linked(server.url) as link:
        link.open()
        server.kill()
        link.submit(0, shard_of(0))
        wait_until(lambda: link.trouble() is not None)
        server.start("--weights", "second")
        error = raised(link)
        assert isinstance(error, AlignmentError)
        assert "another teacher than the one that this run began with; got teacher_id" in str(error)
        link.submit(1, shard_of(1))
        assert raised(link) is error  # and it stays refused


@pytest.mark.slow
def test_a_document_is_never_scored_by_a_teacher_that_was_swapped_between_shards() -> None:
    """The server is replaced while nothing is in flight, so that no connection is seen to break."""
    with ServerProcess() as server, linked(server.url) as link:
        link.open()
        link.submit(0, shard_of(0))
        taken(link)
        server.stop()
        server.start("--weights", "second")
        link.submit(1, shard_of(1))
        assert isinstance(raised(link), AlignmentError)


def test_engine_versions_may_change(caplog) -> None:
    with linked_to_restarted({}, {"engine": {"device": "cpu", "versions": {"vllm": "9"}}}) as link:
        link.submit(0, shard_of(0))
        assert_scored(taken(link)[1], shard_of(0))
        assert link.served["engine"]["versions"] == {"vllm": "9"}
    assert any("engine is {'device': 'cpu', 'versions': {'vllm'" in m for m in caplog.messages)


@contextlib.contextmanager
def linked_to_restarted(first: dict, second: dict) -> Iterator[TeacherLink]:
    """A link that was opened on one server and has another on the same port."""
    port = free_port()
    with linked(f"http://127.0.0.1:{port}") as link:
        with served_teacher(port=port, **first):
            link.open()
        with served_teacher(port=port, **second):
            yield link


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


def hanging(link: TeacherLink, server: Served) -> None:
    server.engine.open.clear()
    link.submit(0, shard_of(0))
    wait_until(lambda: server.queue.figures().tokens_in_flight > 0)


def test_close_does_not_wait_for_a_request_that_hangs() -> None:
    with served_teacher() as server, linked(server.url) as link:
        link.open()
        hanging(link, server)
        link.close()
        assert not link._thread.is_alive()
        # The connection is gone too: the server has dropped the documents.
        wait_until(lambda: server.queue.figures().tokens_in_flight == 0)


def test_close_while_the_server_is_away() -> None:
    with linked(f"http://127.0.0.1:{free_port()}") as link:
        with pytest.raises(EngineError):
            link.open(link.close)
        link.close()
        assert not link._thread.is_alive()


def test_a_request_that_hangs_is_told_and_asked_again(monkeypatch) -> None:
    monkeypatch.setattr(teacher_module, "_SLOW_SEC", 0.0)
    with served_teacher() as server, linked(server.url, request_sec=0.5) as link:
        link.open()
        hanging(link, server)
        assert "has been at shard 0, rollout 0 of 3 for" in str(link.trouble())
        wait_until(lambda: "does not answer" in str(link.trouble()))
        assert "ReadTimeout" in str(link.trouble())
        server.engine.open.set()
        assert_scored(taken(link)[1], shard_of(0))
