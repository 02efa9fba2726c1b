"""A scoring server on a real socket of this process, around an engine that needs no model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from common.config import load_config, named_config
from datastore import serve
from datastore.serve_app import ServeConfig, make_app
from datastore.serve_engine import ScoringQueue
from datastore.teacher import TeacherConfig
from tests.datastore.line_engine import LineEngine
from tests.datastore.waiting import wait_until


@dataclass(frozen=True, kw_only=True)
class Served:
    engine: LineEngine
    queue: ScoringQueue
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def serving(
    engine: LineEngine,
    teacher: TeacherConfig,
    identity: dict[str, Any],
    *,
    port: int = 0,
    token: str | None = None,
    queue_tokens: int = 5000,
    limits: tuple[str, ...] = (),
) -> Iterator[Served]:
    """A server on `port` (0: a free one), in a thread of this process. limits: overrides of configs/serve."""
    queue = ScoringQueue(lambda: (engine, identity), queue_tokens=queue_tokens, batch_tokens=10_000)
    overrides = (*limits, f"queue_tokens={queue_tokens}")
    config = load_config(ServeConfig, named_config("serve", "default"), overrides)
    app = make_app(queue, teacher, config, token)
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    )
    with serve.listening("127.0.0.1", port) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        wait_until(lambda: queue.state == "ready")
        try:
            yield Served(engine=engine, queue=queue, port=sock.getsockname()[1])
        finally:
            engine.open.set()
            server.should_exit = True
            thread.join(30)
            queue.stop(30)
