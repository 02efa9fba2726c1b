"""The HTTP face of the scoring server: what it accepts, refuses and answers. docs/serve.md is its contract."""

from __future__ import annotations

import asyncio
import hmac
import time
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from common.config import Config
from common.errors import AlignmentError, EngineError, FormatError
from datastore.packed import packed_width, unpack
from datastore.prompt import ScoreRequest
from datastore.scoring_protocol import CONTENT_TYPE, decode_request, encode_response
from datastore.serve_engine import Overloaded, ScoringQueue, Ticket, Unavailable
from datastore.serve_metrics import ServeMetrics
from datastore.serve_prompt import score_requests
from datastore.teacher import TeacherConfig

_UNAVAILABLE_RETRY_SEC = 5


class ServeConfig(Config):
    """What the server accepts (configs/serve/default.yaml).

    queue_tokens: prompt tokens of all requests accepted and not yet answered. drain_sec: how long requests in flight
    may take after SIGTERM.
    """

    max_request_mib: int = Field(ge=1, le=1024)
    max_documents: int = Field(ge=1)
    queue_tokens: int = Field(ge=1)
    drain_sec: float = Field(ge=0)

    def limits(self, teacher: TeacherConfig) -> dict[str, int]:
        """What a request must keep to, as `/identity` states it."""
        return {
            "request_bytes": self.max_request_mib << 20,
            "request_documents": self.max_documents,
            "request_tokens": self.queue_tokens,
            "document_tokens": teacher.engine.max_model_len,
        }


class Refusal(Exception):
    """An answer other than 200. reason: a word for metrics and programs."""

    def __init__(self, status: int, reason: str, message: object, retry_sec: int | None = None):
        self.status, self.reason = status, reason
        self.headers = {"Retry-After": str(retry_sec)} if retry_sec is not None else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        super().__init__(str(message))


def make_app(
    queue: ScoringQueue, teacher: TeacherConfig, config: ServeConfig, token: str | None
) -> FastAPI:
    """The application. token: what a client must bear, None for an open server."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    metrics = ServeMetrics(queue)
    service = _Service(queue, teacher, config, token, metrics)
    closed = [Depends(service.require_token)]
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/ready", service.ready, methods=["GET"])
    app.add_api_route("/identity", service.identity, methods=["GET"], dependencies=closed)
    app.add_api_route("/metrics", service.metrics_text, methods=["GET"], dependencies=closed)
    app.add_api_route("/v1/score", service.score, methods=["POST"], dependencies=closed)

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        refusal = _refusal(error)
        if request.url.path == "/v1/score":
            metrics.refused(refusal.status, refusal.reason)
        body = {"error": refusal.reason, "message": str(refusal)}
        return JSONResponse(body, refusal.status, refusal.headers)

    kinds = (Refusal, Overloaded, Unavailable, FormatError, AlignmentError, EngineError)
    for kind in (*kinds, ClientDisconnect, HTTPException):
        app.add_exception_handler(kind, refuse)
    return app


def _refusal(error: Exception) -> Refusal:
    match error:
        case Refusal():
            return error
        case Overloaded():
            return Refusal(429, "queue_full", error, error.retry_sec)
        case Unavailable():
            return Refusal(503, "unavailable", error, _UNAVAILABLE_RETRY_SEC)
        case FormatError() | AlignmentError():
            return Refusal(400, "malformed", error)
        case ClientDisconnect():
            return Refusal(499, "disconnected", "the client went away")
        case HTTPException():
            reason = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
            return Refusal(error.status_code, reason, error.detail)
        case _:
            return Refusal(500, "document_failed", error)


class _Service:
    """The routes. Values in and out; the work itself is the queue's."""

    def __init__(
        self,
        queue: ScoringQueue,
        teacher: TeacherConfig,
        config: ServeConfig,
        token: str | None,
        metrics: ServeMetrics,
    ) -> None:
        self._queue, self._teacher, self._metrics = queue, teacher, metrics
        self._limits = config.limits(teacher)
        self._token = token

    async def require_token(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self._token.encode())
        if scheme.lower() != "bearer" or not same:
            got = "another token" if given else "none"
            raise Refusal(401, "unauthorised", f"a bearer token is needed; got {got}.")

    async def health(self) -> dict[str, str]:
        return {"status": "alive"}

    async def ready(self) -> JSONResponse:
        state = self._queue.state
        return JSONResponse({"state": state}, 200 if state == "ready" else 503)

    async def identity(self) -> dict[str, Any]:
        if self._queue.identity is None:
            self._queue.require_open()
        return {**(self._queue.identity or {}), "limits": self._limits}

    async def metrics_text(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def score(self, request: Request) -> Response:
        start = time.monotonic()
        self._queue.require_open()
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != CONTENT_TYPE:
            message = f"content type; got {kind or 'none'}, expected {CONTENT_TYPE}."
            raise Refusal(415, "content_type", message)
        body = await self._body(request)
        requests = await asyncio.to_thread(self._requests, body)
        packed = await self._packed(request, self._queue.submit(requests))
        content = await asyncio.to_thread(self._content, requests, packed)
        self._metrics.answered(time.monotonic() - start)
        return Response(content, media_type=CONTENT_TYPE)

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        self._limit("request_bytes", int(request.headers.get("content-length", "0")), "bytes")
        async for chunk in request.stream():
            body += chunk
            self._limit("request_bytes", len(body), "bytes")
        return bytes(body)

    def _requests(self, body: bytes) -> list[ScoreRequest]:
        batch = decode_request(body)
        self._limit("request_documents", len(batch.documents), "documents")
        requests = score_requests(batch, self._teacher)
        lengths = [len(request.prompt_T) for request in requests]
        self._limit("document_tokens", max(lengths), "tokens in a document")
        self._limit("request_tokens", sum(lengths), "tokens")
        return requests

    def _limit(self, name: str, found: int, unit: str) -> None:
        if found > (limit := self._limits[name]):
            message = f"the request is too large; got {found:,} {unit}, expected at most {limit:,}."
            raise Refusal(413, name, message)

    async def _packed(self, request: Request, ticket: Ticket) -> dict[int, np.ndarray]:
        """What the engine gives, unless the client goes away first: then its documents are dropped."""
        result = asyncio.wrap_future(ticket.future)
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                raise ClientDisconnect
            return result.result()
        finally:
            gone.cancel()
            if not result.done():
                self._queue.cancel(ticket)

    def _content(self, requests: list[ScoreRequest], packed: dict[int, np.ndarray]) -> bytes:
        threshold = self._teacher.threshold
        empty_PC = np.empty((0, packed_width(threshold)), np.int32)
        targets = [
            unpack(packed.get(index, empty_PC), request.positions_P, threshold)
            for index, request in enumerate(requests)
        ]
        return encode_response(
            targets,
            [request.content_key for request in requests],
            teacher_id=self._queue.identity["teacher_id"],
            threshold=threshold,
        )


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection; its whole body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
