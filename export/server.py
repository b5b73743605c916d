"""An OpenAI-compatible server over the torch-free runtime: /v1/completions, /v1/models, /health.

Requests run one after the other; the prompts and choices of one request run as one batch.
"""

from __future__ import annotations

import secrets
import socket
import time
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from export.api import add_completions
from export.completions import APIError
from export.runtime import Runtime
from export.scheduler import Scheduler
from registry.errors import BadInput

MAX_BODY = 2**22  # bytes of one request
DRAIN_S = 30  # how long running requests may take to end after SIGTERM


def serve(runtime: Runtime, model: str, listener: socket.socket, api_key: str | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that run then are answered first.

    Args:
        model: the name that clients ask for.
        listener: a bound socket, from `listen`.
        api_key: what clients must send as a bearer token; None lets everyone in.
    """
    config = uvicorn.Config(
        application(runtime, model, api_key),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=DRAIN_S,
    )
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port` (0: a free one). Raises BadInput where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot listen on {host} port {port}: {why}", fix="choose another with --port") from None


def application(runtime: Runtime, model: str, api_key: str | None = None) -> ASGIApp:
    """The server as an ASGI application that serves `runtime` under the name `model`."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    scheduler = Scheduler(runtime)
    created = int(time.time())

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": model, "object": "model", "created": created, "owned_by": "limbeck"}
        return {"object": "list", "data": [entry]}

    add_completions(api, scheduler, model)

    @api.exception_handler(APIError)
    async def refused(request: Request, error: APIError) -> Response:
        return _response(error)

    @api.exception_handler(BadInput)
    async def bad_input(request: Request, error: BadInput) -> Response:
        return _response(APIError(400, error.message))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _response(_invalid(error))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _response(APIError(error.status_code, str(error.detail)))

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _response(APIError(500, "the server failed on this request"))

    return _Gate(api, api_key)


class _Gate:
    """What is checked before a request is read: the API key, then the size of the body as it comes in."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self.key = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.key and scope["path"].startswith("/v1/"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self.key):
                wrong = APIError(401, "no API key, or a wrong one", code="invalid_api_key")
                await _response(wrong)(scope, receive, send)
                return
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"the request is larger than {MAX_BODY} bytes")
            return message

        await self.app(scope, limited, send)


def _response(error: APIError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, {"WWW-Authenticate": "Bearer"} if error.status == 401 else None)


def _invalid(error: RequestValidationError) -> APIError:
    """The first field that pydantic found wrong."""
    found = error.errors()
    where = found[0]["loc"][1:2]
    field = str(where[0]) if where and found[0]["type"] != "json_invalid" else None
    words = dict.fromkeys(item["msg"] for item in found if item["loc"][1:2] == where)
    message = " or ".join(words)
    return APIError(400, f"{field}: {message}" if field else message, field)
