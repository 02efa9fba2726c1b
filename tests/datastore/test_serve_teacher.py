"""The tiny teacher behind the server: what a client gets equals what the scorer gives the same requests."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn

from common.config import load_config, named_config
from common.errors import ConfigError
from datastore import serve
from datastore.harmony import RenderConfig, Renderer
from datastore.prompt import Prefix, ScoreRequest
from datastore.scoring_client import ScoreDocument, ScoringClient
from datastore.scoring_protocol import CONTENT_TYPE, encode_request
from datastore.serve_app import ServeConfig, make_app
from datastore.serve_engine import ScoringQueue
from datastore.target import head_mask, require_valid
from datastore.teacher import TeacherConfig
from datastore.types import RenderedDoc, SparseTarget
from demo.tiny_teacher import train_tiny_teacher

pytestmark = pytest.mark.slow
WHOLE = Prefix(np.empty(0, np.int32), np.empty(0, np.int32), None, None)
STORED = RenderConfig()
EFFORTS = ("low", None, "medium", "high")


def swapped(document: RenderedDoc, effort: str | None) -> ScoreRequest:
    """What the teacher must be shown: the same document under another effort, swapped here by hand."""
    shown = STORED.model_copy(update={"reasoning": effort or STORED.reasoning})
    prefix = Prefix(Renderer(STORED).prefix_T, Renderer(shown).prefix_T, None, effort)
    return prefix.request(document.tokens_T, document.spans_T)


@pytest.fixture(scope="module")
def documents(handmade) -> list[RenderedDoc]:
    long = " ".join(f"{i} plus one is {i + 1}." for i in range(12))
    return [handmade.document(i, answer=long if i % 4 == 0 else "") for i in range(8)]


@pytest.fixture(scope="module")
def served(documents, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server with steps of 96 tokens; before it starts, its own engine scores the requests the usual way."""
    pairs = [(d.tokens_T, d.spans_T) for d in documents]
    model = train_tiny_teacher(
        tmp_path_factory.mktemp("teacher") / "tiny", pairs, seed=3, steps=40, source="test"
    )
    overrides = (f"model={model}", "engine.max_num_batched_tokens=96")
    teacher = load_config(TeacherConfig, named_config("teacher", "tiny"), overrides)
    expected: dict[str, list[SparseTarget]] = {}

    def start():
        scorer, identity = serve.start_engine(teacher, model)
        expected["whole"] = scorer.score([WHOLE.request(*pair) for pair in pairs])
        expected["efforts"] = scorer.score(
            [swapped(d, effort) for d, effort in zip(documents, EFFORTS * 2, strict=True)]
        )
        return scorer, identity

    queue = ScoringQueue(start, queue_tokens=20_000, batch_tokens=96)
    config = load_config(ServeConfig, named_config("serve", "default"), ("max_documents=3",))
    app = make_app(queue, teacher, config, token="secret")
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    with serve.listening("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        try:
            with ScoringClient(url, token="secret", timeout_sec=300) as client:
                client.identity()  # waits until the engine is ready
                yield SimpleNamespace(client=client, expected=expected, queue=queue, url=url)
        finally:
            server.should_exit = True
            thread.join(30)
            assert queue.stop(60)


def ask(document: RenderedDoc, effort: str | None = None) -> ScoreDocument:
    return ScoreDocument(tokens_T=document.tokens_T, spans_T=document.spans_T, reasoning=effort)


def assert_same(found: SparseTarget, expected: SparseTarget) -> None:
    """Other batches round float32 sums otherwise; a draw may then fall on a near id of the tail."""
    require_valid(found)
    np.testing.assert_array_equal(found.positions_P, expected.positions_P)
    np.testing.assert_array_equal(found.num_head_P, expected.num_head_P)
    np.testing.assert_array_equal(found.offsets_P1, expected.offsets_P1)
    same_E = found.ids_E == expected.ids_E
    in_head_E = head_mask(found.num_head_P, np.diff(found.offsets_P1) - found.num_head_P)
    assert same_E[in_head_E].all() and same_E.mean() > 0.95
    for name in ("weights_E", "realised_logprob_P", "log_tail_mass_P", "entropy_P"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)


def test_served_targets_equal_the_scorers(served, documents) -> None:
    targets = served.client.score([ask(d) for d in documents])
    for found, expected in zip(targets, served.expected["whole"], strict=True):
        assert_same(found, expected)


def test_documents_of_many_clients_share_batches(served, documents) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        targets = list(pool.map(lambda d: served.client.score([ask(d)])[0], documents * 2))
    for found, expected in zip(targets, served.expected["whole"] * 2, strict=True):
        assert_same(found, expected)


def test_each_document_may_have_its_own_reasoning_effort(served, documents) -> None:
    asked = [ask(d, effort) for d, effort in zip(documents, EFFORTS * 2, strict=True)]
    targets = served.client.score(asked, render=STORED)
    for found, expected in zip(targets, served.expected["efforts"], strict=True):
        assert_same(found, expected)
    plain = served.expected["whole"]
    moved = [
        float(np.abs(found.realised_logprob_P - same.realised_logprob_P).max())
        for found, same in zip(targets, plain, strict=True)
    ]
    unmoved = [effort in (None, "high") for effort in EFFORTS * 2]  # `high` is what is stored
    assert [move < 1e-5 for move in moved] == unmoved


def test_a_client_that_goes_away_leaves_the_engine_as_it_was(served, documents) -> None:
    headers = {"Content-Type": CONTENT_TYPE, "Authorization": "Bearer secret"}
    impatient = httpx.Timeout(30, read=0.01)
    for document in documents[:3]:
        body = encode_request([ask(document)])
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/score", content=body, headers=headers, timeout=impatient)
    assert served.queue.wait_idle(60)
    (found,) = served.client.score([ask(documents[0])])
    assert_same(found, served.expected["whole"][0])
    figures = served.queue.figures()
    assert (figures.documents_running, figures.tokens_in_flight) == (0, 0)


def test_identity_names_the_teacher(served) -> None:
    identity = served.client.identity()
    assert identity["canary"]["positions"] >= 100
    assert identity["tokenizer"]["vocab_size"] == 201_088
    assert identity["weights"]["weights"][0]["sha256"]
    served.client.require_identity({"teacher": "tiny", "threshold": 0.02, "dtype": "float32"})
    with pytest.raises(ConfigError, match=r"got threshold 0\.02; expected threshold 0\.01"):
        served.client.require_identity({"threshold": 0.01})
