"""What stands between a server and its clients: the API key, the size and pace of a body, and the end of the server."""

from __future__ import annotations

import asyncio
import secrets

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from limbeck.export.server.completions import APIError
from limbeck.export.server.metrics import Metrics

MODEL_PATHS = (
    "/v1/",
    "/tokenize",
    "/detokenize",
)  # how the addresses begin where the model is used: they ask for the key
BODY_TIMEOUT_S = 30.0  # how long a client may take to send a request


class Admission:
    """An ASGI application that lets requests through to another one, or does not.

    Attributes:
        draining: no new request is served; those that run go on.
        running: requests for the model that are not answered.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, max_body: int) -> None:
        self.app, self.metrics, self.max_body = app, metrics, max_body
        self.expected_authorization = f"Bearer {api_key}".encode() if api_key else None
        self.is_draining = False
        self.running_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # a client that left before it was answered

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_api = scope["path"].startswith(MODEL_PATHS)
        self.running_requests += is_api
        try:
            refusal = self._refusal(scope) if is_api else None
            if refusal is not None:
                await error_response(refusal)(scope, receive, noted)
            else:
                await self.app(scope, self._limit_body(receive), noted)
        finally:
            self.running_requests -= is_api
            # The route that was found; any other path has one name, so that no client can make up many.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.http_requests.labels(path, str(status)).inc()

    def _refusal(self, scope: Scope) -> APIError | None:
        if self.expected_authorization:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self.expected_authorization):
                return APIError(401, "no API key, or a wrong one", code="invalid_api_key")
        if self.is_draining:
            return APIError(503, "the server is about to end", code="draining")
        return None

    def _limit_body(self, receive: Receive) -> Receive:
        """`receive`, for a body that is neither too large nor too slow."""
        size, whole = 0, False
        deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT_S

        async def limited() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request did not come whole within {BODY_TIMEOUT_S:g} s") from None
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(413, f"the request is larger than {self.max_body} bytes")
            whole = not message.get("more_body", False)
            return message

        return limited


def error_response(error: APIError, retry_after: int | None = None) -> JSONResponse:
    """A refusal in OpenAI's form."""
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.status == 503 or retry_after is not None:
        headers["Retry-After"] = str(retry_after or 1)
    return JSONResponse(error.body(), error.status, headers)
