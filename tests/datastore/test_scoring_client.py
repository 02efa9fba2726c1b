"""The scoring client against a server whose every answer is written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from common.errors import AlignmentError, ConfigError, EngineError, FormatError
from datastore import scoring_client
from datastore.scoring_client import (
    DocumentFailed,
    DocumentRefused,
    NoAnswer,
    ScoreDocument,
    ScoringClient,
)
from datastore.scoring_protocol import decode_request, encode_request, encode_response
from datastore.target import content_key
from datastore.types import SparseTarget

LIMITS = {
    "request_bytes": 1 << 20,
    "request_documents": 3,
    "request_tokens": 200,
    "document_tokens": 100,
}
IDENTITY = {"protocol": 1, "teacher": "paper", "teacher_id": "t1", "limits": LIMITS}


def document(length: int, first: int = 0) -> ScoreDocument:
    return ScoreDocument(
        tokens_T=np.arange(first, first + length, dtype=np.int32),
        spans_T=np.minimum(np.arange(length), 1).astype(np.uint8),
    )


def target(scored: ScoreDocument, shift: int = 0) -> SparseTarget:
    positions_P = scored.positions() + np.int32(shift)
    count = len(positions_P)
    return SparseTarget(
        threshold=0.02,
        positions_P=positions_P,
        num_head_P=np.zeros(count, np.int32),
        offsets_P1=np.zeros(count + 1, np.int64),
        ids_E=np.empty(0, np.int32),
        weights_E=np.empty(0, np.float32),
        realised_logprob_P=np.full(count, -float(scored.tokens_T[0]), np.float32),
        log_tail_mass_P=np.zeros(count, np.float32),
        entropy_P=np.ones(count, np.float32),
    )


def scored_body(
    body: bytes, *, teacher_id: str = "t1", shift: int = 0, key_change: int = 0
) -> bytes:
    documents = decode_request(body).documents
    return encode_response(
        [target(d, shift) for d in documents],
        [content_key(d.tokens_T) ^ key_change for d in documents],
        teacher_id=teacher_id,
        threshold=0.02,
    )


def said(status: int, message: str, **headers: str):
    body = json.dumps({"error": "word", "message": message}).encode()
    return lambda _: (status, {key.replace("_", "-"): v for key, v in headers.items()}, body)


def scoring(**changes):
    return lambda body: (200, {}, scored_body(body, **changes))


class Paper:
    """Answers each POST with the next of `script`, the last one for ever; None drops the connection."""

    def __init__(self) -> None:
        self.identity: dict = IDENTITY
        self.script: list = [scoring()]
        self.bodies: list[bytes] = []
        self.tokens: list[str | None] = []
        paper = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paper.tokens.append(self.headers["Authorization"])
                self._answer(200, {}, json.dumps(paper.identity).encode())

            def do_POST(self) -> None:
                paper.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                step = paper.script[min(len(paper.bodies), len(paper.script)) - 1]
                if step is None:
                    self.connection.close()
                    return
                self._answer(*step(paper.bodies[-1]))

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Paper]:
    monkeypatch.setattr(scoring_client, "_FIRST_PAUSE_SEC", 0.01)
    made = Paper()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def client(paper: Paper) -> Iterator[ScoringClient]:
    with ScoringClient(paper.url, token="hidden", timeout_sec=20) as made:
        yield made


def test_large_batches_go_in_parts_and_come_back_in_order(paper, client) -> None:
    sizes = [10, 20, 30, 40, 60, 60, 99, 5]
    documents = [document(n, first=1 + 1000 * i) for i, n in enumerate(sizes)]
    targets = client.score(documents)
    for found, sent in zip(targets, documents, strict=True):
        np.testing.assert_array_equal(found.positions_P, sent.positions())
        assert found.realised_logprob_P[0] == -float(sent.tokens_T[0])
    parts = [[len(d.tokens_T) for d in decode_request(body).documents] for body in paper.bodies]
    # At most 3 documents, and at most 100 tokens: half of what the server's queue holds.
    assert parts == [[10, 20, 30], [40, 60], [60], [99], [5]]
    assert paper.tokens == ["Bearer hidden"]


def test_parts_keep_to_the_limit_of_bytes(paper, client) -> None:
    roomy = {"request_documents": 100, "request_tokens": 10**6}
    paper.identity = {**IDENTITY, "limits": {**LIMITS, **roomy, "request_bytes": 70_000}}
    client.score([document(90, first=1) for _ in range(30)])
    assert len(paper.bodies) > 1
    assert max(map(len, paper.bodies)) <= 70_000


def test_no_documents_is_no_request(paper, client) -> None:
    assert client.score([]) == [] and paper.bodies == []


def test_a_busy_starting_or_dropping_server_is_asked_again(paper, client) -> None:
    paper.script = [
        said(429, "full", Retry_After="0"),
        said(503, "starting"),
        None,
        said(503, "no", Retry_After="soon"),
        scoring(),
    ]
    (found,) = client.score([document(9, first=7)])
    assert found.realised_logprob_P[0] == -7 and len(paper.bodies) == 5


def test_retry_after_is_kept(paper) -> None:
    """Told to come again after the deadline, it gives up at once and says why."""
    paper.script = [said(429, "the queue is full", Retry_After="30")]
    with ScoringClient(paper.url, timeout_sec=5) as client, pytest.raises(EngineError) as error:
        client.score([document(9)])
    assert "no answer from" in str(error.value) and "the queue is full" in str(error.value)
    assert len(paper.bodies) == 1


def test_an_absent_server_is_an_engine_error(paper) -> None:
    refusing = pytest.raises(EngineError, match=r"in 0\.3 s; got ConnectError")
    with ScoringClient("http://127.0.0.1:9", timeout_sec=0.3) as client, refusing:
        client.identity()


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, ConfigError), (401, ConfigError), (413, ConfigError), (500, EngineError)],
)
def test_refusals_are_told_and_not_repeated(paper, client, status, kind) -> None:
    paper.script = [said(status, "because of this")]
    with pytest.raises(kind, match=f"refused with status {status}: because of this"):
        client.score([document(9)])
    assert len(paper.bodies) == 1


def test_a_refusal_that_is_no_json_is_told_too(paper, client) -> None:
    paper.script = [lambda _: (502, {}, b"<html>bad gateway")]
    with pytest.raises(EngineError, match="status 502: <html>bad gateway"):
        client.score([document(9)])


@pytest.mark.parametrize(
    ("changes", "said_so"),
    [
        ({"teacher_id": "t2"}, "has become another teacher; got t2; expected t1"),
        ({"shift": 1}, "other documents or positions"),
        ({"key_change": 1}, "other documents or positions"),
    ],
)
def test_a_foreign_answer_is_never_taken(paper, client, changes, said_so) -> None:
    paper.script = [scoring(**changes)]
    with pytest.raises(AlignmentError, match=said_so):
        client.score([document(9)])


@pytest.mark.parametrize(
    ("status", "word", "kind"),
    [
        (400, "malformed", DocumentRefused),
        (413, "document_tokens", DocumentRefused),
        (413, "request_tokens", ConfigError),
        (401, "unauthorised", ConfigError),
        (500, "document_failed", DocumentFailed),
        (500, "other", EngineError),
    ],
)
def test_a_refusal_says_whether_a_document_is_at_fault(paper, client, status, word, kind) -> None:
    body = json.dumps({"error": word, "message": "because"}).encode()
    paper.script = [lambda _: (status, {}, body)]
    with pytest.raises((ConfigError, EngineError)) as error:
        client.score([document(9)])
    assert type(error.value) is kind


def test_one_attempt_is_one_request(paper, client) -> None:
    busy = pytest.raises(NoAnswer, match="is busy; got full; ask again")
    paper.script = [said(429, "full", Retry_After="7"), said(503, "starting"), None, scoring()]
    client.identity()
    with busy as error:
        client.score_part([document(9)], None, 5)
    assert error.value.retry_sec == 7
    for state in ("is not ready", "does not answer"):
        with pytest.raises(NoAnswer, match=state):
            client.score_part([document(9)], None, 5)
    (found,) = client.score_part([document(9, first=7)], None, 5)
    assert found.realised_logprob_P[0] == -7 and len(paper.bodies) == 4


def test_the_first_part_is_what_a_request_may_hold(client) -> None:
    documents = [document(9, first=n) for n in range(5)]
    assert client.first_part(documents) == documents[:3]
    assert client.first_part([document(500)])[0].tokens_T.size == 500


def test_room_for_a_document(client) -> None:
    client.require_room(100)
    with pytest.raises(ConfigError, match=r"document_tokens 100; expected at least 101"):
        client.require_room(101)
    with pytest.raises(ConfigError, match=r"request_bytes 1,048,576, request_tokens 200, document"):
        client.require_room(250_000)


def test_an_identity_asked_again_is_the_one_that_counts(paper, client) -> None:
    assert client.identity()["teacher_id"] == "t1"
    paper.identity = {**IDENTITY, "teacher_id": "t2"}
    assert client.identity()["teacher_id"] == "t1"
    assert client.ask_identity(5)["teacher_id"] == "t2" == client.identity()["teacher_id"]
    paper.script = [scoring(teacher_id="t2")]
    assert len(client.score([document(9)])) == 1


def test_a_page_that_is_no_identity_is_refused(paper, client) -> None:
    paper.identity = ["hello"]
    with pytest.raises(ConfigError, match="is no scoring server; got '\\[\"hello\"\\]'"):
        client.identity()


def test_close_ends_a_request_of_another_thread(paper) -> None:
    asked, answer, errors = threading.Event(), threading.Event(), []

    def hang(body: bytes):
        asked.set()
        assert answer.wait(60)
        return 200, {}, scored_body(body)

    def work() -> None:
        try:
            client.score([document(9)])
        except EngineError as error:
            errors.append(error)

    paper.script = [hang]
    client = ScoringClient(paper.url, timeout_sec=600)
    thread = threading.Thread(target=work)
    thread.start()
    assert asked.wait(30)
    client.close()
    thread.join(30)
    assert not thread.is_alive() and "was closed" in str(errors[0])
    answer.set()


def test_an_answer_with_other_rows_is_never_taken(paper, client) -> None:
    paper.script = [lambda _: (200, {}, scored_body(encode_request([document(9)])))]
    with pytest.raises(AlignmentError, match="other documents"):
        client.score([document(9), document(9)])


def test_a_damaged_answer_is_a_format_error(paper, client) -> None:
    paper.script = [lambda body: (200, {}, scored_body(body)[:-200])]
    with pytest.raises(FormatError, match="scoring response"):
        client.score([document(9)])


def test_a_document_that_cannot_be_scored_is_not_sent(paper, client) -> None:
    with pytest.raises(FormatError, match="first token is a target"):
        client.score(
            [ScoreDocument(tokens_T=np.arange(3, dtype=np.int32), spans_T=np.ones(3, np.uint8))]
        )
    assert paper.bodies == []


def test_another_protocol_is_refused(paper, client) -> None:
    paper.identity = {**IDENTITY, "protocol": 9}
    with pytest.raises(ConfigError, match="got 9; expected 1"):
        client.score([document(9)])


def test_a_url_without_a_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
        ScoringClient("localhost:8765")


def test_threads_share_a_client(paper, client) -> None:
    found: list[float] = []

    def work(first: int) -> None:
        found.append(float(client.score([document(9, first=first)])[0].realised_logprob_P[0]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == [-float(n) for n in range(16, 0, -1)]
    assert paper.tokens == ["Bearer hidden"]


def test_neither_torch_nor_an_engine_is_needed() -> None:
    """The trainer's image has no vLLM and no web server."""
    code = "import sys, datastore.scoring_client; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "httpx" in loaded
    assert not {"torch", "vllm", "fastapi", "starlette", "uvicorn"} & set(loaded)
