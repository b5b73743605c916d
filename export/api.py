"""POST /v1/completions: from a request's body to the answer, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from export.completions import APIError, CompletionRequest, Delta, Usage, deltas, token_ids
from export.queued import Unavailable
from export.served import Served
from registry.errors import BadInput


def add_completions(api: FastAPI, served: Served) -> None:
    """Answer POST /v1/completions with the model that is served when a request comes."""
    model = served.name

    @api.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        if body.model not in (None, model):
            message = f"the model {body.model!r} is not served here; {model!r} is"
            raise APIError(404, message, "model", "model_not_found")
        scheduler = served.current().scheduler
        prompts = await asyncio.to_thread(token_ids, scheduler.runtime, body)
        results = deltas(scheduler, body, prompts)
        usage = Usage(sum(map(len, prompts)))
        head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}
        if body.stream:
            results = await _while_connected(request, _begun(results))
            with_usage = bool((body.stream_options or {}).get("include_usage"))
            return StreamingResponse(_sse(head, results, usage, with_usage), media_type="text/event-stream")
        choices = await _while_connected(request, _whole(results, usage))
        return JSONResponse({**head, "choices": choices, "usage": usage.row()})


async def _begun(results: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
    """The same results, the first of them at hand: what is wrong with a request is told by the status."""
    first = await anext(results)

    async def all_of_them() -> AsyncGenerator[Delta]:
        async with aclosing(results):
            yield first
            async for delta in results:
                yield delta

    return all_of_them()


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
            told = APIError(500, message)
            if isinstance(error, Unavailable):
                told = APIError(error.status, str(error), code=error.code)
            yield _event(told.body())
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
