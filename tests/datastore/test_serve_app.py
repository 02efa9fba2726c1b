"""The scoring server over a real socket: answers, refusals, limits, tokens, disconnects."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from datastore.harmony import RenderConfig
from datastore.scoring_protocol import (
    CONTENT_TYPE,
    ScoreDocument,
    decode_response,
    encode_request,
)
from datastore.types import SparseTarget
from tests.datastore import served
from tests.datastore.line_engine import IDENTITY, POISON, LineEngine, teacher
from tests.datastore.waiting import wait_until

TOKEN = "a long secret"


def document(length: int, first: int = 1000, **changes) -> ScoreDocument:
    tokens_T = np.arange(first, first + length, dtype=np.int32)
    spans_T = (np.arange(length) >= length // 2).astype(np.uint8)
    return ScoreDocument(**({"tokens_T": tokens_T, "spans_T": spans_T} | changes))


@contextlib.contextmanager
def line_server(token: str | None = None, queue_tokens: int = 5000) -> Iterator[SimpleNamespace]:
    """The line engine behind small limits, and a connection to it."""
    with served.serving(
        LineEngine(),
        teacher("engine.max_model_len=200"),
        IDENTITY,
        token=token,
        queue_tokens=queue_tokens,
        limits=("max_request_mib=1", "max_documents=9"),
    ) as server:
        facts = {"engine": server.engine, "queue": server.queue, "port": server.port}
        with httpx.Client(base_url=server.url, timeout=60) as http:
            yield SimpleNamespace(http=http, **facts)


@pytest.fixture(scope="module")
def line() -> Iterator[SimpleNamespace]:
    with line_server() as server:
        yield server


def post(
    http: httpx.Client, content: bytes, kind: str = CONTENT_TYPE, **headers: str
) -> httpx.Response:
    return http.post("/v1/score", content=content, headers={"Content-Type": kind, **headers})


def assert_line(target: SparseTarget, scored: ScoreDocument) -> None:
    """The targets that the engine of these tests gives by its rule, worked out again from the document."""
    positions_P = scored.positions()
    assert target.positions_P.tolist() == positions_P.tolist()
    assert target.num_head_P.tolist() == [1] * len(positions_P)
    assert target.ids_E.tolist() == (scored.tokens_T[positions_P] + 1).tolist()
    np.testing.assert_allclose(target.weights_E, np.exp(-1 / (1 + positions_P)), rtol=1e-6)
    assert target.realised_logprob_P.tolist() == (-positions_P / 8).tolist()
    assert target.entropy_P.tolist() == (positions_P / 16).tolist()


def test_targets_come_in_order_with_the_identity_of_the_teacher(line) -> None:
    ranges_R2 = np.array([[2, 4], [6, 7]], np.int32)
    sent = [document(30), document(9, spans_T=None, ranges_R2=ranges_R2), document(50, first=5000)]
    answer = post(line.http, encode_request(sent))
    assert answer.status_code == 200 and answer.headers["content-type"] == CONTENT_TYPE
    batch = decode_response(answer.content)
    assert batch.teacher_id == line.http.get("/identity").json()["teacher_id"] == "ab" * 32
    assert batch.content_keys == [d.content_key() for d in sent]
    for target, scored in zip(batch.targets, sent, strict=True):
        assert_line(target, scored)


def test_a_document_without_targets_has_an_empty_one(line) -> None:
    nothing = document(12, spans_T=np.zeros(12, np.uint8))
    batch = decode_response(post(line.http, encode_request([nothing, document(5)])).content)
    assert [len(t.positions_P) for t in batch.targets] == [0, 3]


def test_health_readiness_and_identity(line) -> None:
    assert line.http.get("/health").json() == {"status": "alive"}
    assert line.http.get("/ready").json() == {"state": "ready"}
    identity = line.http.get("/identity").json()
    assert identity["limits"] == {
        "request_bytes": 1 << 20,
        "request_documents": 9,
        "request_tokens": 5000,
        "document_tokens": 200,
    }


@pytest.mark.parametrize(
    ("content", "kind", "status", "reason", "said"),
    [
        (b"{}", "application/json", 415, "content_type", "got application/json"),
        (b"", CONTENT_TYPE, 400, "malformed", "no Arrow IPC stream"),
        (
            encode_request([document(9)])[:-100],
            CONTENT_TYPE,
            400,
            "malformed",
            "no Arrow IPC stream",
        ),
        (encode_request([]), CONTENT_TYPE, 400, "malformed", "got no documents"),
        (
            encode_request([document(9, tokens_T=np.full(9, 201_088, np.int32))]),
            CONTENT_TYPE,
            400,
            "malformed",
            "expected 0 to 201087",
        ),
        (
            encode_request([document(9, reasoning="low")]),
            CONTENT_TYPE,
            400,
            "malformed",
            "no render config in the request",
        ),
        (
            encode_request([document(150)], RenderConfig()),
            CONTENT_TYPE,
            400,
            "malformed",
            "does not open with the prefix",
        ),
        (b"\0" * ((1 << 20) + 1), CONTENT_TYPE, 413, "request_bytes", "1,048,577 bytes"),
        (
            encode_request([document(9)] * 10),
            CONTENT_TYPE,
            413,
            "request_documents",
            "10 documents",
        ),
        (encode_request([document(201)]), CONTENT_TYPE, 413, "document_tokens", "got 201 tokens"),
        (
            encode_request([document(9, first=POISON)]),
            CONTENT_TYPE,
            500,
            "document_failed",
            "NaN",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_refusals(line, content, kind, status, reason, said) -> None:
    before = metric(line.http, "vpmoe_serve_rejects_total", f'reason="{reason}"')
    answer = post(line.http, content, kind)
    assert (answer.status_code, answer.json()["error"]) == (status, reason)
    assert said in answer.json()["message"]
    after = metric(line.http, "vpmoe_serve_rejects_total", f'reason="{reason}"')
    assert after == before + 1


def metric(http: httpx.Client, name: str, labels: str = "") -> float:
    wanted = f"{name}{{{labels}}} " if labels else f"{name} "
    lines = http.get("/metrics").text.splitlines()
    return next((float(text.split()[-1]) for text in lines if text.startswith(wanted)), 0.0)


def test_a_body_without_a_stated_length_is_bounded_too(line) -> None:
    answer = post(line.http, iter([b"\0" * 400_000] * 3))
    assert (answer.status_code, answer.json()["error"]) == (413, "request_bytes")


def test_more_tokens_than_the_queue_ever_takes() -> None:
    with line_server(queue_tokens=300) as server:
        answer = post(server.http, encode_request([document(150)] * 3))
        assert (answer.status_code, answer.json()["error"]) == (413, "request_tokens")


def test_unknown_places_and_methods(line) -> None:
    assert line.http.get("/docs").json()["error"] == "not_found"
    assert line.http.get("/v1/score").json()["error"] == "method_not_allowed"


def test_metrics_count_what_was_done(line) -> None:
    names = ["documents_done_total", "tokens_done_total", "steps_total"]
    before = [metric(line.http, f"vpmoe_serve_{name}") for name in names]
    post(line.http, encode_request([document(30), document(20)]))
    after = [metric(line.http, f"vpmoe_serve_{name}") for name in names]
    assert after[0] - before[0] == 2 and after[1] - before[1] == 50 and after[2] > before[2]
    assert metric(line.http, "vpmoe_serve_ready") == 1
    assert metric(line.http, "vpmoe_serve_tokens_in_flight") == 0


def test_a_token_guards_all_but_the_probes() -> None:
    with line_server(token=TOKEN) as server:
        http, content = server.http, encode_request([document(9)])
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            answers = [http.get(path, headers=headers) for path in ("/identity", "/metrics")]
            answers.append(post(http, content, **headers))
            assert [answer.status_code for answer in answers] == [401] * 3
            assert answers[0].headers["www-authenticate"] == "Bearer"
            assert TOKEN not in answers[2].text
        assert post(http, content, Authorization=f"Bearer {TOKEN}").status_code == 200
        assert metric_with_token(http) == 3


def metric_with_token(http: httpx.Client) -> float:
    text = http.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
    (value,) = [v for v in text.splitlines() if v.startswith("vpmoe_serve_rejects_total{")]
    return float(value.split()[-1])


def test_a_full_queue_is_429_with_retry_after() -> None:
    with line_server(queue_tokens=300) as server:
        server.engine.open.clear()
        answers: list[httpx.Response] = []
        send = lambda: answers.append(post(server.http, encode_request([document(200)])))  # noqa: E731
        waiting = threading.Thread(target=send)
        waiting.start()
        wait_until(lambda: server.queue.figures().tokens_in_flight == 200)
        busy = post(server.http, encode_request([document(101)]))
        assert (busy.status_code, busy.json()["error"]) == (429, "queue_full")
        assert int(busy.headers["retry-after"]) >= 1
        server.engine.open.set()
        waiting.join(30)
        assert answers[0].status_code == 200


def test_a_client_that_goes_away_takes_its_documents_with_it() -> None:
    with line_server() as server:
        server.engine.open.clear()
        content = encode_request([document(50)] * 4)
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: {CONTENT_TYPE}\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            wait_until(lambda: len(server.engine.added) == 4)
        wait_until(lambda: server.queue.figures().tokens_in_flight == 0)
        server.engine.open.set()
        wait_until(lambda: len(server.engine.aborted) == 4)
        assert post(server.http, encode_request([document(9)])).status_code == 200
        wait_until(lambda: metric(server.http, "vpmoe_serve_requests_total", 'status="499"') == 1)
