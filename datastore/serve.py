"""`vpmoe-data serve`: one teacher engine behind HTTP, from its start to its end.

The HTTP server runs on the main thread from the first second, so that /health and /ready answer while the engine
loads. SIGTERM or SIGINT drains and ends with 0. A dead engine ends the process with 1: a supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from common.errors import ConfigError
from common.files import canonical_json, sha256_bytes
from common.provenance import git_sha
from datastore.canary import require_canary
from datastore.codec import CODEC_VERSION
from datastore.manifest import TokenizerInfo
from datastore.scoring_protocol import PROTOCOL_VERSION
from datastore.serve_app import ServeConfig, make_app
from datastore.serve_engine import ScoringQueue
from datastore.teacher import TeacherConfig, local_model, weights_identity
from datastore.vllm_scorer import VllmScorer

TOKEN_VARIABLE = "VPMOE_TOKEN"
# How long the engine may take to close, and answers to leave, before the process ends all the same.
_CLOSE_SEC = 10
_LOG = logging.getLogger(__name__)


def serve_teacher(
    teacher: TeacherConfig, config: ServeConfig, *, host: str, port: int, token: str | None
) -> None:
    """Serve until SIGTERM. Raises ConfigError (no model, address in use), EngineError when the engine dies."""
    model = local_model(teacher)
    with listening(host, port) as sock:
        queue = ScoringQueue(
            lambda: start_engine(teacher, model),
            queue_tokens=config.queue_tokens,
            batch_tokens=teacher.engine.max_num_batched_tokens,
        )
        _LOG.info("teacher %s: listening on %s", teacher.name, _url(sock))
        run_server(queue, make_app(queue, teacher, config, token), sock, config.drain_sec)


def start_engine(teacher: TeacherConfig, model: Path) -> tuple[VllmScorer, dict[str, Any]]:
    """An engine that has passed the canary, and the server's identity."""
    weights = weights_identity(teacher, model)
    scorer = VllmScorer(teacher, model)
    canary = require_canary(scorer, teacher, model, weights=weights)
    _LOG.info("teacher %s: ready", teacher.name)
    return scorer, server_identity(
        teacher, model, weights=weights, engine=scorer.identity(), canary=canary
    )


def server_identity(
    teacher: TeacherConfig,
    model: Path,
    *,
    weights: dict[str, Any],
    engine: dict[str, Any],
    canary: dict[str, Any],
) -> dict[str, Any]:
    """What `/identity` states, but for the limits."""
    return {
        "protocol": PROTOCOL_VERSION,
        "codec_version": CODEC_VERSION,
        "teacher": teacher.name,
        "teacher_id": teacher_id(teacher, weights),
        "model": teacher.model if teacher.revision else model.name,
        "revision": teacher.revision,
        "weights": weights,
        "tokenizer": TokenizerInfo().resolved(),
        "threshold": teacher.threshold,
        "temperature": teacher.temperature,
        "dtype": teacher.dtype,
        "system": teacher.system and teacher.system.resolved(),
        "engine": engine,
        "vpmoe": git_sha(),
        "canary": canary,
    }


def teacher_id(teacher: TeacherConfig, weights: dict[str, Any]) -> str:
    """Hex sha256 of all that the targets of a document depend on: config, weights, tokenizer."""
    shaping = {"teacher": {**teacher.shaping(), **weights}, "tokenizer": TokenizerInfo().resolved()}
    return sha256_bytes(canonical_json(shaping))


def read_token(token_file: Path | None) -> str | None:
    """The bearer token, from a file or the variable VPMOE_TOKEN; None when neither is given."""
    given = os.environ.get(TOKEN_VARIABLE) or None
    if token_file is None:
        return given
    if given is not None:
        raise ConfigError(
            f"two tokens: --token-file {token_file} and {TOKEN_VARIABLE}", remedy="give one of them"
        )
    try:
        token = token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token file {token_file}: {error}") from None
    if not token:
        raise ConfigError(f"the token file {token_file} is empty")
    return token


def require_guarded(host: str, token: str | None, *, no_token: bool) -> None:
    """ConfigError when anyone beyond this machine could use the server without a token."""
    if token is not None and no_token:
        raise ConfigError("--no-token with a token", remedy="give one of them")
    if token is None and not no_token and not _is_loopback(host):
        raise ConfigError(
            f"host {host} is reachable from other machines, and there is no token",
            remedy=f"give --token-file FILE or {TOKEN_VARIABLE}, or --no-token on a closed network",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket; port 0 takes a free one. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            remedy="give another --host or --port",
        ) from None
    with sock:
        yield sock


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which end the process by the signal: draining comes first here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(queue: ScoringQueue, app: Any, sock: socket.socket, drain_sec: float) -> None:
    """Answer on `sock` until SIGTERM or SIGINT. Raises EngineError when the engine dies."""
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_SEC,
        )
    )
    asyncio.run(_live(queue, server, sock, drain_sec))


async def _live(
    queue: ScoringQueue, server: uvicorn.Server, sock: socket.socket, drain_sec: float
) -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    http = asyncio.create_task(server.serve(sockets=[sock]))
    ended = asyncio.wrap_future(queue.ended)
    told = asyncio.create_task(asked.wait())
    await asyncio.wait({http, ended, told}, return_when=asyncio.FIRST_COMPLETED)
    closed = True
    if not ended.done():
        _LOG.info("draining")
        queue.drain()
        await asyncio.to_thread(queue.wait_idle, drain_sec)
        closed = await asyncio.to_thread(queue.stop, _CLOSE_SEC)
    server.should_exit = True
    await http
    told.cancel()
    if not closed:
        _LOG.warning("the engine does not close: ending without it")
        os._exit(
            0
        )  # the interpreter's own end would wait for, or crash in, the thread inside the engine
    await ended
