"""The OpenAI-compatible server over the torch-free runtime: /v1, /health, /ready and /metrics.

Concurrent requests are decoded as one batch (limbeck.export.server.engine), and the artifact can be replaced while
they run (limbeck.export.server.hot_swap).
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import AsyncIterator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from limbeck.export.server.admission import Admission, error_response
from limbeck.export.server.hot_swap import ServedModel
from limbeck.export.server.metrics import CONTENT_TYPE
from limbeck.export.server.openai.embeddings import add_embedding_routes
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.routes import add_completion_routes
from limbeck.export.server.openai.routes_models import add_model_routes
from limbeck.export.server.openai.routes_responses import add_response_routes
from limbeck.export.server.protocol import Protocol
from limbeck.export.server.requests import Unavailable
from limbeck.export.server.watch import Artifact, WatchProblem
from limbeck.registry.core.errors import BadInput

MAX_BODY = 2**22  # bytes of one request body
DRAIN_S = 30.0  # how long running requests may continue after SIGTERM
STALLED_S = 60  # the kernel closes a connection whose client reads nothing for so long; that ends the request
MAX_OPEN_FILES = 65536
SEND_BUFFER = 2**17  # bytes that the kernel buffers for a slow reader; the default grows to megabytes


def serve(
    served: ServedModel,
    listener: socket.socket,
    *,
    artifacts: AsyncIterator[Artifact | WatchProblem] | None = None,
    api_key: str | None = None,
    max_body: int = MAX_BODY,
    drain_s: float = DRAIN_S,
    cors: Sequence[str] = (),
) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer the running and waiting requests before returning.

    Args:
        served: the model.
        listener: a bound socket, from `open_listener`.
        artifacts: new artifacts to swap to, from a watcher; None: never swap.
        api_key: the bearer token that clients must send; None: no key is needed.
        max_body: bytes of one request body.
        drain_s: how long the last requests may take; a second signal ends them at once.
        cors: the origins whose pages may use the server, such as "https://example.org"; "*" is any.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    _allow_many_files()
    admission = create_app(served, api_key, max_body)
    config = uvicorn.Config(
        _allow_origins(admission, cors) if cors else admission,
        http=Protocol,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
        backlog=2048,
    )
    asyncio.run(_Server(config, admission, drain_s).run_with(served, listener, artifacts))


def open_listener(host: str, port: int) -> socket.socket:
    """Open a listening socket on `host` and `port` (0: any free port). Raises BadInput if that fails."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot listen on {host} port {port}: {reason}", fix="choose another with --port") from None
    # Accepted connections inherit these options. Without TCP_NODELAY, small chunks are delayed by 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_S * 1000)
    return listener


def create_app(served: ServedModel, api_key: str | None = None, max_body: int = MAX_BODY) -> Admission:
    """Make the server's ASGI application; parameters as in `serve`."""
    about = "An OpenAI-compatible server of one model."
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"description": "an error in OpenAI's format"}}
    api = FastAPI(title="limbeck serve", description=about, docs_url=None, redoc_url=None, responses=errors)
    admission = Admission(api, served.metrics, api_key, max_body)
    _add_status_routes(api, served, admission)
    add_completion_routes(api, served)
    add_response_routes(api, served)
    add_embedding_routes(api, served)
    add_model_routes(api, served)

    @api.exception_handler(APIError)
    async def refused(request: Request, error: APIError) -> Response:
        return error_response(error)

    @api.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> Response:
        return error_response(APIError(error.status, str(error), code=error.code), error.retry_after)

    @api.exception_handler(BadInput)
    async def bad_input(request: Request, error: BadInput) -> Response:
        return error_response(APIError(400, error.message))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(_validation_error(error))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(APIError(error.status_code, str(error.detail)))

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(APIError(500, "internal error"))

    return admission


def _allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Answer what browsers ask before and with requests of pages from these origins."""
    return CORSMiddleware(app, origins, ["GET", "HEAD", "POST"], ["*"], expose_headers=["Retry-After"])


def _add_status_routes(api: FastAPI, served: ServedModel, admission: Admission) -> None:
    """Add the routes for those who operate the server."""

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/ready")
    async def ready() -> Response:
        if admission.is_draining:
            return JSONResponse({"status": "draining"}, 503, {"Retry-After": "1"})
        return JSONResponse({"status": "ready", "version": served.current().version})

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE)


class _Server(uvicorn.Server):
    """uvicorn's server, but after the first signal it still accepts requests, to answer them with 503."""

    def __init__(self, config: uvicorn.Config, admission: Admission, drain_s: float) -> None:
        super().__init__(config)
        self._admission, self._drain_s = admission, drain_s
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run_with(
        self, served: ServedModel, listener: socket.socket, artifacts: AsyncIterator[Artifact | WatchProblem] | None
    ) -> None:
        """Serve, and swap to new artifacts meanwhile."""
        self._loop = asyncio.get_running_loop()
        swapping = artifacts and asyncio.ensure_future(served.swap_on_changes(artifacts))
        try:
            await self.serve(sockets=[listener])
        finally:
            if swapping:
                swapping.cancel()
                await asyncio.gather(swapping, return_exceptions=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining at the first signal; exit at the second."""
        if self._admission.is_draining or self._loop is None:
            super().handle_exit(sig, frame)
        else:
            self._admission.is_draining = True
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        """Exit when the last request is answered or the time is up."""
        end = asyncio.get_running_loop().time() + self._drain_s
        while self._admission.running_requests and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        self.should_exit = True


def _allow_many_files() -> None:
    """Raise the limit of open files, usually 1,024, up to the hard limit: each connection is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _validation_error(error: RequestValidationError) -> APIError:
    """A 400 for the first invalid field, with all of pydantic's messages about it."""
    errors = error.errors()
    path = errors[0]["loc"][1:2]
    field = str(path[0]) if path and errors[0]["type"] != "json_invalid" else None
    messages = dict.fromkeys(item["msg"] for item in errors if item["loc"][1:2] == path)
    message = " or ".join(messages)
    return APIError(400, f"{field}: {message}" if field else message, field)
