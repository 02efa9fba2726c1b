"""The client of `vpmoe-data serve`: documents in, sparse targets out. Needs neither torch nor vLLM."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

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

__all__ = ["ScoreDocument", "ScoringClient"]

_CONNECT_SEC = 10.0
_FIRST_PAUSE_SEC, _LONGEST_PAUSE_SEC = 0.25, 30.0
# Bytes of a body beyond its tokens: schema, metadata and the offsets of a document, with room.
_BODY_BYTES, _DOCUMENT_BYTES = 1 << 16, 128
_BUSY = (429, 503)


class ScoringClient:
    """One teacher server. May be shared by threads. `close` it, or use it as a context manager.

    timeout_sec: the longest that one call may take, waiting for a busy or absent server included.
    """

    def __init__(self, url: str, token: str | None = None, timeout_sec: float = 600.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError("url of a scoring server", got=url, expected="http://HOST:PORT")
        self.url, self._timeout_sec = url.rstrip("/"), timeout_sec
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # No proxy of the environment: the server is named, and token ids stay between the two.
        self._http = httpx.Client(base_url=self.url, headers=headers, trust_env=False)
        self._known: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> ScoringClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def identity(self) -> dict[str, Any]:
        """Who scores: `/identity`, asked once; every later answer must come from the same teacher.

        Raises ConfigError (no such server, token, other protocol) or EngineError (not ready in time).
        """
        with self._lock:
            if self._known is None:
                response = self._ask("GET", "/identity", time.monotonic() + self._timeout_sec)
                known = response.json()
                if known.get("protocol") != PROTOCOL_VERSION:
                    raise ConfigError(
                        f"{self.url} speaks another protocol",
                        got=known.get("protocol"),
                        expected=PROTOCOL_VERSION,
                        remedy="run server and client from the same version",
                    )
                self._known = known
            return self._known

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
        identity = self.identity()
        targets: list[SparseTarget] = []
        for part in _parts(documents, identity["limits"]):
            positions = [document.positions() for document in part]
            answer = self._ask("POST", "/v1/score", deadline, encode_request(part, render))
            batch = decode_response(answer.content)
            self._require_answer(batch, part, positions, identity["teacher_id"])
            targets += batch.targets
        return targets

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

    def _ask(
        self, method: str, path: str, deadline: float, content: bytes | None = None
    ) -> httpx.Response:
        """The answer with status 200; busy and broken ones are asked for again until the deadline."""
        pause = _FIRST_PAUSE_SEC
        while True:
            retry_sec, cause = 0.0, ""
            try:
                response = self._send(method, path, deadline, content)
            except httpx.TransportError as error:
                cause = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return response
                cause = _message(response)
                if response.status_code not in _BUSY:
                    raise self._refused(response.status_code, cause)
                retry_sec = _retry_after(response)
            wait = max(retry_sec, pause * random.uniform(0.5, 1.0))
            if time.monotonic() + wait >= deadline:
                raise EngineError(
                    f"no answer from {self.url}{path} in {self._timeout_sec:g} s",
                    got=cause,
                    remedy="check that the server runs and is ready, or allow more time",
                )
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_SEC)

    def _send(
        self, method: str, path: str, deadline: float, content: bytes | None
    ) -> httpx.Response:
        left = max(deadline - time.monotonic(), 0.001)
        return self._http.request(
            method,
            path,
            content=content,
            headers={"Content-Type": CONTENT_TYPE} if content is not None else {},
            timeout=httpx.Timeout(left, connect=min(left, _CONNECT_SEC)),
        )

    def _refused(self, status: int, message: str) -> ConfigError | EngineError:
        kind = ConfigError if status < 500 else EngineError
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


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}: {response.text[:200]}"


def _retry_after(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
