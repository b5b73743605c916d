"""Admission: checks the API key, limits the size and time of request bodies, and refuses requests while draining."""

from __future__ import annotations

import asyncio
import secrets

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from limbeck.export.server.metrics import Metrics
from limbeck.export.server.openai.errors import APIError

MODEL_PATHS = ("/v1/", "/tokenize", "/detokenize")  # paths that start so need the API key
BODY_TIMEOUT_S = 30.0  # how long a client may take to send a body


class Admission:
    """ASGI middleware in front of the API.

    Args:
        app: the API.
        metrics: counts the answers.
        api_key: the bearer token that clients must send; None: no key is needed.
        max_body: bytes of one request body.

    Attributes:
        is_draining: refuse new requests with 503; running requests continue.
        running_requests: unanswered requests for the model.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, max_body: int) -> None:
        self.app, self.metrics, self.max_body = app, metrics, max_body
        self.api_key = api_key.encode() if api_key else None
        self.is_draining = False
        self.running_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # answered as GET, of whose answer uvicorn sends no body
            scope = {**scope, "method": "GET"}
        status = 499  # stays so if the client disconnects before the answer

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_api = scope["path"].startswith(MODEL_PATHS)
        self.running_requests += is_api
        try:
            refusal = self._refusal(scope) if is_api else None
            if refusal is not None:
                await error_response(refusal)(scope, receive, send_and_note)
            else:
                await self.app(scope, self._limit_body(receive), send_and_note)
        finally:
            self.running_requests -= is_api
            # Unknown paths share one label, so that clients cannot create any number of them.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.http_requests.labels(path, str(status)).inc()

    def _refusal(self, scope: Scope) -> APIError | None:
        """Why a request for the model is refused; None if it is not."""
        if self.api_key:
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(key.strip(), self.api_key):
                return APIError(401, "the API key is missing or wrong", code="invalid_api_key")
        if self.is_draining:
            return APIError(503, "the server is shutting down", code="draining")
        return None

    def _limit_body(self, receive: Receive) -> Receive:
        """Wrap `receive`: raise 413 for a body that is too large, 408 for one that takes too long."""
        size, is_complete = 0, False
        deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT_S

        async def limited() -> Message:
            nonlocal size, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request body was not complete within {BODY_TIMEOUT_S:g} s") from None
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(413, f"the request is larger than {self.max_body} bytes")
            is_complete = not message.get("more_body", False)
            return message

        return limited


def error_response(error: APIError, retry_after: int | None = None) -> JSONResponse:
    """An error in OpenAI's format, with the headers of its status; `retry_after` in seconds."""
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.status == 503 or retry_after is not None:
        headers["Retry-After"] = str(retry_after or 1)
    return JSONResponse(error.body(), error.status, headers)
