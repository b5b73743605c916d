"""An OpenAI-compatible server over the torch-free runtime: /v1/completions, /v1/models, /health.

Requests run one after the other; the prompts and choices of one request run as one batch.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from export.completions import APIError, CompletionRequest, Delta, Usage, deltas, token_ids
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

    @api.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        if body.model not in (None, model):
            message = f"the model {body.model!r} is not served here; {model!r} is"
            raise APIError(404, message, "model", "model_not_found")
        prompts = await asyncio.to_thread(token_ids, runtime, body)
        results = deltas(scheduler, body, prompts)
        usage = Usage(sum(map(len, prompts)))
        head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}
        if body.stream:
            with_usage = bool((body.stream_options or {}).get("include_usage"))
            return StreamingResponse(_sse(head, results, usage, with_usage), media_type="text/event-stream")
        choices = await _while_connected(request, _whole(results, usage))
        return JSONResponse({**head, "choices": choices, "usage": usage.row()})

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


async def _whole(results: AsyncGenerator[Delta], usage: Usage) -> list[dict[str, Any]]:
    """The choices of an answer that is not streamed, by index."""
    choices: dict[int, dict[str, Any]] = {}
    async with aclosing(results):
        async for delta in results:
            usage.completion += delta.new_tokens
            choice = choices.setdefault(delta.index, Delta(delta.index, "").row())
            choice["text"] += delta.text
            choice["finish_reason"] = delta.finish_reason
            if delta.logprobs is not None:
                # A new dictionary: the choices of one prompt were given the same one.
                before = choice["logprobs"] or {}
                choice["logprobs"] = {k: before.get(k, []) + v for k, v in delta.logprobs.items()}
    return [choices[index] for index in sorted(choices)]


async def _sse(
    head: dict[str, Any], results: AsyncGenerator[Delta], usage: Usage, with_usage: bool
) -> AsyncIterator[str]:
    """The answer as server-sent events, one for each token."""
    extra = {"usage": None} if with_usage else {}
    async with aclosing(results):
        try:
            async for delta in results:
                usage.completion += delta.new_tokens
                yield _event({**head, "choices": [delta.row()], **extra})
        except Exception as error:  # the status is sent: all that is left is to tell it
            message = error.message if isinstance(error, BadInput) else "the server failed on this request"
            yield _event(APIError(500, message).body())
            return
    if with_usage:
        yield _event({**head, "choices": [], "usage": usage.row()})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled when the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise APIError(499, "the client left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
