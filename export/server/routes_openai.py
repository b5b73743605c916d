"""POST /v1/completions and /v1/chat/completions: from a request's body to the answer, whole or streamed."""

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

from limbeck.export.server import chat, completions
from limbeck.export.server.chat import ChatForm, ChatRequest
from limbeck.export.server.completions import APIError, CompletionRequest, Delta, Settings, TextForm, Usage
from limbeck.export.server.hot_swap import Served
from limbeck.export.server.requests import Unavailable
from limbeck.registry.core.errors import BadInput

Form = TextForm | ChatForm


def add_completions(api: FastAPI, served: Served) -> None:
    """Answer with the model that is served when a request comes."""

    @api.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        check_model(served, body.model)
        scheduler = served.current().scheduler
        prompts = await asyncio.to_thread(completions.token_ids, scheduler.runtime, body)
        results = completions.deltas(scheduler, body, prompts)
        return await _answer(request, served.name, body, TextForm(), results, Usage(sum(map(len, prompts))))

    @api.post("/v1/chat/completions")
    async def converse(body: ChatRequest, request: Request) -> Response:
        check_model(served, body.model)
        loaded = served.current()
        prompt = await asyncio.to_thread(body.prompt, loaded.scheduler.runtime, loaded.template)
        results = chat.deltas(loaded.scheduler, body, prompt)
        return await _answer(request, served.name, body, ChatForm(), results, Usage(len(prompt)))


def check_model(served: Served, name: str | None) -> None:
    """Raises APIError where a request names another model."""
    if name not in (None, served.name):
        message = f"the model {name!r} is not served here; {served.name!r} is"
        raise APIError(404, message, "model", "model_not_found")


async def _answer(
    request: Request, model: str, body: Settings, form: Form, results: AsyncGenerator[Delta], usage: Usage
) -> Response:
    """The answer, whole or streamed."""
    head: dict[str, Any] = {"id": f"{form.prefix}-{uuid4().hex}", "object": form.whole_object}
    head |= {"created": int(time.time()), "model": model}
    if body.stream:
        head["object"] = form.part_object
        results = await _while_connected(request, _begun(results))
        events = _sse(head, form, results, usage, body.usage_is_streamed())
        return StreamingResponse(events, media_type="text/event-stream")
    choices = await _while_connected(request, _whole(results, usage))
    return JSONResponse({**head, "choices": [form.whole(choice) for choice in choices], "usage": usage.row()})


async def _begun(results: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
    """The same results, the first of them at hand: what is wrong with a request is told by the status."""
    first = await anext(results)

    async def all_of_them() -> AsyncGenerator[Delta]:
        async with aclosing(results):
            yield first
            async for delta in results:
                yield delta

    return all_of_them()


async def _whole(results: AsyncGenerator[Delta], usage: Usage) -> list[Delta]:
    """The choices of an answer that is not streamed, by index."""
    parts: dict[int, list[Delta]] = {}
    async with aclosing(results):
        async for delta in results:
            usage.count(delta)
            parts.setdefault(delta.index, []).append(delta)
    return [_joined(parts[index]) for index in sorted(parts)]


def _joined(parts: list[Delta]) -> Delta:
    """A choice of its pieces."""
    told = [part.logprobs for part in parts if part.logprobs is not None]
    logprobs = {key: [item for part in told for item in part[key]] for key in told[0]} if told else None
    return Delta(parts[0].index, "".join(part.text for part in parts), parts[-1].finish_reason, logprobs)


async def _sse(
    head: dict[str, Any], form: Form, results: AsyncGenerator[Delta], usage: Usage, with_usage: bool
) -> AsyncIterator[str]:
    """The answer as server-sent events, one for each token."""
    extra = {"usage": None} if with_usage else {}
    begun: set[int] = set()
    async with aclosing(results):
        try:
            async for delta in results:
                usage.count(delta)
                opening = None if delta.index in begun else form.opening(delta.index)
                begun.add(delta.index)
                for choice in filter(None, (opening, form.part(delta))):
                    yield _event({**head, "choices": [choice], **extra})
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
