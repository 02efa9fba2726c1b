"""The client of `vpmoe-data serve`: documents in, sparse targets out. Needs neither torch nor vLLM."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx
import numpy as np

from common.errors import AlignmentError, ConfigError, EngineError
from datastore.harmony import RenderConfig
from datastore.scoring_protocol import (
    CONTENT_TYPE,
    PROTOCOL_VERSION,
    ScoredBatch,
    ScoreDocument,
    decode_response,
    encode_request,
)
from datastore.types import SparseTarget

__all__ = ["DocumentFailed", "DocumentRefused", "NoAnswer", "ScoreDocument", "ScoringClient"]

_CONNECT_SEC = 10.0
# uvicorn closes an idle connection after 5 s: one that is given up before is never found closed by a request.
_IDLE_SEC = 2.0
_FIRST_PAUSE_SEC, _LONGEST_PAUSE_SEC = 0.25, 30.0
# Bytes of a body beyond its tokens: schema, metadata and the offsets of a document, with room.
_BODY_BYTES, _DOCUMENT_BYTES = 1 << 16, 128
_BUSY = {429: "is busy", 503: "is not ready"}
# Words of a refusal that one document of the request can be the cause of (docs/serve.md).
_OF_DOCUMENTS = ("malformed", "document_tokens", "document_failed")
_Answer = TypeVar("_Answer")


class NoAnswer(EngineError):
    """The server is absent, starting, busy, or was lost before its answer: the same may be asked again.

    state: "does not answer", "is not ready" or "is busy". cause: one line. retry_sec: ask again no sooner.
    """

    def __init__(self, url: str, state: str, cause: str, retry_sec: float = 0.0) -> None:
        self.state, self.cause, self.retry_sec = state, cause, retry_sec
        super().__init__(f"{url} {state}", got=cause, remedy="ask again")


class DocumentRefused(ConfigError):
    """A document of the request cannot be scored as it is."""


class DocumentFailed(EngineError):
    """The teacher gave no numbers for a document of the request."""


class ScoringClient:
    """One teacher server. May be shared by threads. `close` it, or use it as a context manager.

    timeout_sec: the longest that `identity` and `score` may take, waiting for a busy or absent server included.
    """

    def __init__(self, url: str, token: str | None = None, timeout_sec: float = 600.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError("url of a scoring server", got=url, expected="http://HOST:PORT")
        self.url, self._timeout_sec = url.rstrip("/"), timeout_sec
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # No proxy of the environment: the server is named, and token ids stay between the two.
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=_IDLE_SEC),
        )
        self._known: dict[str, Any] | None = None
        self._asking = threading.Lock()
        self._lock, self._closed = threading.Lock(), False
        self._connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def __enter__(self) -> ScoringClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Safe from any thread: what another one waits for ends at once, with an EngineError."""
        with self._lock:
            self._closed = True
            for connection in list(self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(
                        socket.SHUT_RDWR
                    )  # close alone does not wake a thread in recv
        self._http.close()

    def identity(self) -> dict[str, Any]:
        """Who scores: `/identity`, asked once; every later answer must come from the same teacher.

        Raises ConfigError (no such server, token, other protocol) or EngineError (not ready in time).
        """
        with self._asking:
            if self._known is None:
                deadline = time.monotonic() + self._timeout_sec
                return self._patiently("/identity", deadline, self.ask_identity)
            return self._known

    def ask_identity(self, timeout_sec: float) -> dict[str, Any]:
        """`/identity` as it is now, in one attempt; from here on it is the one that answers must come from.

        Raises NoAnswer or ConfigError.
        """
        answer = self._attempt("GET", "/identity", timeout_sec)
        try:
            known: dict[str, Any] = answer.json()
            found = known.get("protocol")
        except (ValueError, AttributeError):
            raise ConfigError(
                f"{self.url} is no scoring server", got=repr(answer.text[:100])
            ) from None
        if found != PROTOCOL_VERSION:
            raise ConfigError(
                f"{self.url} speaks another protocol",
                got=found,
                expected=PROTOCOL_VERSION,
                remedy="run server and client from the same version",
            )
        self._known = known
        return known

    def require_identity(self, expected: dict[str, Any]) -> None:
        """ConfigError with every key of `expected` that the server's identity has otherwise."""
        found = self.identity()
        wrong = {key: value for key, value in expected.items() if found.get(key) != value}
        if wrong:
            raise ConfigError(
                f"{self.url} is another teacher",
                got=", ".join(f"{key} {found.get(key)}" for key in wrong),
                expected=", ".join(f"{key} {value}" for key, value in wrong.items()),
                remedy="start the server with the teacher that this run was configured for",
            )

    def require_room(self, num_tokens: int) -> None:
        """ConfigError unless the server takes a document that the teacher is shown as `num_tokens` tokens."""
        limits = self.identity()["limits"]
        needed = {
            "request_bytes": 5 * num_tokens + _DOCUMENT_BYTES + _BODY_BYTES,
            "request_tokens": num_tokens,
            "document_tokens": num_tokens,
        }
        small = [name for name, size in needed.items() if limits[name] < size]
        if small:
            raise ConfigError(
                f"{self.url} takes no document of {num_tokens:,} tokens",
                got=", ".join(f"{name} {limits[name]:,}" for name in small),
                expected=", ".join(f"at least {needed[name]:,}" for name in small),
                remedy="start the server with a larger engine.max_model_len, serve.queue_tokens or "
                "serve.max_request_mib",
            )

    def score(
        self, documents: list[ScoreDocument], render: RenderConfig | None = None
    ) -> list[SparseTarget]:
        """Targets in document coordinates, in the order of `documents`; as `VllmScorer.score` gives them.

        render: the config of the constant prefix of the documents, which the teacher's own system text or a document's
        `reasoning` replaces. Batches beyond the server's limits are sent in parts. A full, starting or absent
        server is asked again until the time is over. Raises FormatError (a document that cannot be scored), ConfigError
        (refused), EngineError (the teacher failed, or no answer in time), AlignmentError (an answer for other tokens).
        """
        deadline = time.monotonic() + self._timeout_sec
        targets: list[SparseTarget] = []
        for part in _parts(documents, self.identity()["limits"]):
            ask = functools.partial(self.score_part, part, render)
            targets += self._patiently("/v1/score", deadline, ask)
        return targets

    def first_part(self, documents: list[ScoreDocument]) -> list[ScoreDocument]:
        """As many of the first of `documents` as one request may hold, at least one."""
        return next(_parts(documents, self.identity()["limits"]))

    def score_part(
        self, documents: list[ScoreDocument], render: RenderConfig | None, timeout_sec: float
    ) -> list[SparseTarget]:
        """`score` in one request and one attempt, of documents that it may hold (`first_part`).

        Raises NoAnswer, else as `score`: DocumentRefused or DocumentFailed where a document is at fault.
        """
        teacher_id = self.identity()["teacher_id"]
        positions = [document.positions() for document in documents]
        answer = self._attempt("POST", "/v1/score", timeout_sec, encode_request(documents, render))
        batch = decode_response(answer.content)
        self._require_answer(batch, documents, positions, teacher_id)
        return batch.targets

    def _require_answer(
        self,
        batch: ScoredBatch,
        documents: list[ScoreDocument],
        positions: list[np.ndarray],
        teacher_id: str,
    ) -> None:
        if batch.teacher_id != teacher_id:
            raise AlignmentError(
                f"{self.url} has become another teacher",
                got=batch.teacher_id,
                expected=teacher_id,
                remedy="restart this run against the teacher that it began with",
            )
        same = len(batch.targets) == len(documents) and all(
            document.content_key() == key and np.array_equal(wanted_P, target.positions_P)
            for document, wanted_P, key, target in zip(
                documents, positions, batch.content_keys, batch.targets, strict=True
            )
        )
        if not same:
            raise AlignmentError(f"{self.url} answered for other documents or positions")

    def _patiently(self, path: str, deadline: float, ask: Callable[[float], _Answer]) -> _Answer:
        """What `ask`, given the seconds left, returns; asked again while there is NoAnswer, until the deadline."""
        pause = _FIRST_PAUSE_SEC
        while True:
            try:
                return ask(max(deadline - time.monotonic(), 0.001))
            except NoAnswer as error:
                wait = max(error.retry_sec, pause * random.uniform(0.5, 1.0))
                if time.monotonic() + wait >= deadline:
                    raise EngineError(
                        f"no answer from {self.url}{path} in {self._timeout_sec:g} s",
                        got=error.cause,
                        remedy="check that the server runs and is ready, or allow more time",
                    ) from None
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_SEC)

    def _attempt(
        self, method: str, path: str, timeout_sec: float, content: bytes | None = None
    ) -> httpx.Response:
        """The answer with status 200. Raises NoAnswer, or what a refusal is."""
        if self._closed:
            raise EngineError(f"the connection to {self.url} was closed")
        try:
            response = self._http.request(
                method,
                path,
                content=content,
                headers={"Content-Type": CONTENT_TYPE} if content is not None else {},
                timeout=httpx.Timeout(timeout_sec, connect=min(timeout_sec, _CONNECT_SEC)),
                extensions={"trace": self._remember},
            )
        except httpx.TransportError as error:
            cause = f"{type(error).__name__}: {error}"
            raise NoAnswer(self.url, "does not answer", cause) from None
        if response.status_code == 200:
            return response
        if state := _BUSY.get(response.status_code):
            raise NoAnswer(self.url, state, _said(response, "message"), _retry_after(response))
        raise self._refused(response)

    def _remember(self, event: str, info: dict[str, Any]) -> None:
        """Keep the sockets of open connections, so that `close` can end them."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            connection = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._connections.add(connection)
            if self._closed:
                raise httpx.CloseError("the client was closed")

    def _refused(self, response: httpx.Response) -> ConfigError | EngineError:
        status, of_document = response.status_code, _said(response, "error") in _OF_DOCUMENTS
        if status < 500:
            kind: type[ConfigError | EngineError] = DocumentRefused if of_document else ConfigError
        else:
            kind = DocumentFailed if of_document else EngineError
        message = _said(response, "message")
        return kind(f"{self.url} refused with status {status}: {message}")


def _parts(documents: list[ScoreDocument], limits: dict[str, int]) -> Iterator[list[ScoreDocument]]:
    """Consecutive documents that one request may hold. A document that alone exceeds a limit is left to the server.

    Half the queue at most: a request that needs all of it waits until nothing else is in flight, and the teacher may be
    shown a longer prefix than the documents have.
    """
    part: list[ScoreDocument] = []
    tokens = size = 0
    room_tokens = limits["request_tokens"] // 2
    room_bytes = limits["request_bytes"] - _BODY_BYTES
    for document in documents:
        more_tokens, more_bytes = _cost(document)
        full = (
            len(part) >= limits["request_documents"]
            or tokens + more_tokens > room_tokens
            or size + more_bytes > room_bytes
        )
        if part and full:
            yield part
            part, tokens, size = [], 0, 0
        part.append(document)
        tokens, size = tokens + more_tokens, size + more_bytes
    if part:
        yield part


def _cost(document: ScoreDocument) -> tuple[int, int]:
    arrays = (document.tokens_T, document.spans_T, document.ranges_R2)
    sizes = (0 if values is None else values.size for values in arrays)
    return len(document.tokens_T), 4 * sum(sizes) + _DOCUMENT_BYTES


def _said(response: httpx.Response, key: str) -> str:
    """A field of a refusal; of an answer that is none, its beginning."""
    try:
        return str(response.json()[key])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}: {response.text[:200]}"


def _retry_after(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
