"""The link to the tiny teacher in vLLM, behind the real server."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import uvicorn

from common.config import load_config, named_config
from datastore import serve
from datastore.alignment import MIN_MARGIN
from datastore.harmony import RenderConfig
from datastore.scoring_client import ScoreDocument
from datastore.serve_app import ServeConfig, make_app
from datastore.serve_engine import ScoringQueue
from datastore.target import require_valid
from datastore.teacher import TeacherConfig
from demo.tiny_teacher import train_tiny_teacher
from tests.datastore.waiting import wait_until
from tests.trainer.opd.served import handmade_documents
from trainer.opd.config import TeacherServerConfig
from trainer.opd.teacher import TeacherLink
from trainer.opd.teacher_identity import STABLE_KEYS

pytestmark = pytest.mark.slow
DOCUMENTS = handmade_documents(12)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pairs = [(d.tokens_T, d.spans_T) for d in DOCUMENTS]
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    model = train_tiny_teacher(folder, pairs, seed=3, steps=60, source="test")
    teacher = load_config(TeacherConfig, named_config("teacher", "tiny"), (f"model={model}",))
    queue = ScoringQueue(
        lambda: serve.start_engine(teacher, model),
        queue_tokens=20_000,
        batch_tokens=teacher.engine.max_num_batched_tokens,
    )
    config = load_config(ServeConfig, named_config("serve", "default"), ("queue_tokens=20000",))
    app = make_app(queue, teacher, config, token=None)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    with serve.listening("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert queue.stop(60)


def test_the_tiny_teacher_is_waited_for_and_passes_the_gate(url, caplog) -> None:
    """It is asked while its engine starts; the same documents are then scored under two efforts."""
    config = TeacherServerConfig(name="tiny", url=url)
    link = TeacherLink(config, RenderConfig(), seq_len=512)
    try:
        identity = link.open()
        assert tuple(identity) == STABLE_KEYS and identity["weights"]["weights"][0]["sha256"]
        assert link.served["canary"]["positions"] >= 100 and link.served["engine"]["versions"]
        gated = [ScoreDocument(tokens_T=d.tokens_T, spans_T=d.spans_T) for d in DOCUMENTS]
        report = link.gate(gated)
        assert report.margin_back > MIN_MARGIN and report.documents == len(DOCUMENTS)
        for shard, effort in enumerate(("high", "low")):
            link.submit(shard, [_of_effort(document, effort) for document in gated])
        wait_until(lambda: link.figures().shards == 2, 120)
        shards = [link.take() for _ in range(2)]
    finally:
        link.close()
    assert any("is not ready for" in message for message in caplog.messages)
    (_, high), (_, low) = shards
    for document, first, second in zip(gated, high, low, strict=True):
        require_valid(first)
        assert first.positions_P.tolist() == document.positions().tolist()
        assert np.abs(first.realised_logprob_P - second.realised_logprob_P).max() > 1e-4


def _of_effort(document: ScoreDocument, effort) -> ScoreDocument:
    return ScoreDocument(tokens_T=document.tokens_T, spans_T=document.spans_T, reasoning=effort)
