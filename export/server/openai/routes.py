"""The routes POST /v1/completions and /v1/chat/completions; answers are whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from limbeck.export.server.hot_swap import ServedModel
from limbeck.export.server.openai import chat, completions
from limbeck.export.server.openai.answers.parser import AnswerPart, join_calls
from limbeck.export.server.openai.chat import ChatFormatter, ChatRequest
from limbeck.export.server.openai.completions import (
    CompletionFormatter,
    CompletionRequest,
    Delta,
    GenerationRequest,
    Usage,
)
from limbeck.export.server.openai.http import (
    await_first_delta,
    cancel_on_disconnect,
    check_model,
    error_of_stream,
    warn_of_unknown_fields,
)

Formatter = CompletionFormatter | ChatFormatter


def add_completion_routes(api: FastAPI, served: ServedModel) -> None:
    """Add the routes. A request keeps the artifact that is served when it arrives."""

    @api.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        await warn_of_unknown_fields(request, body)
        check_model(served, body.model)
        scheduler = served.current().scheduler
        prompts = await asyncio.to_thread(completions.encode_prompts, scheduler.runtime, body)
        results = completions.stream_deltas(scheduler, body, prompts)
        return await _respond(request, served.name, body, CompletionFormatter(), results, Usage(sum(map(len, prompts))))

    @api.post("/v1/chat/completions")
    async def chat_complete(body: ChatRequest, request: Request) -> Response:
        await warn_of_unknown_fields(request, body)
        check_model(served, body.model)
        loaded = served.current()
        prepared = await asyncio.to_thread(body.prepare, loaded)
        results = chat.stream_deltas(loaded.scheduler, body, prepared)
        return await _respond(request, served.name, body, ChatFormatter(), results, Usage(len(prepared.prompt)))


async def _respond(
    request: Request,
    model: str,
    body: GenerationRequest,
    formatter: Formatter,
    results: AsyncGenerator[Delta],
    usage: Usage,
) -> Response:
    """The answer to a request, whole or streamed."""
    head: dict[str, Any] = {"id": f"{formatter.id_prefix}-{uuid4().hex}", "object": formatter.object_type}
    head |= {"created": int(time.time()), "model": model}
    if body.stream:
        head["object"] = formatter.chunk_object_type
        results = await cancel_on_disconnect(request, await_first_delta(results))
        events = _server_sent_events(head, formatter, results, usage, body.usage_is_streamed())
        return StreamingResponse(events, media_type="text/event-stream")
    choices = await cancel_on_disconnect(request, _collect_choices(results, usage))
    return JSONResponse({**head, "choices": [formatter.choice(choice) for choice in choices], "usage": usage.to_json()})


async def _collect_choices(results: AsyncGenerator[Delta], usage: Usage) -> list[Delta]:
    """Collect the whole choices, in order of their index."""
    parts: dict[int, list[Delta]] = {}
    async with aclosing(results):
        async for delta in results:
            usage.add(delta)
            parts.setdefault(delta.index, []).append(delta)
    return [_join_deltas(parts[index]) for index in sorted(parts)]


def _join_deltas(parts: list[Delta]) -> Delta:
    """Join the deltas of one choice."""
    tables = [part.logprobs for part in parts if part.logprobs is not None]
    logprobs = {key: [item for table in tables for item in table[key]] for key in tables[0]} if tables else None
    answer = AnswerPart(
        "".join(delta.part.text for delta in parts),
        "".join(delta.part.reasoning for delta in parts),
        join_calls(call for delta in parts for call in delta.part.calls),
    )
    return Delta(parts[0].index, answer, parts[-1].finish_reason, logprobs)


async def _server_sent_events(
    head: dict[str, Any], formatter: Formatter, results: AsyncGenerator[Delta], usage: Usage, with_usage: bool
) -> AsyncIterator[str]:
    """Format an answer as server-sent events, one for each token."""
    extra = {"usage": None} if with_usage else {}
    started: set[int] = set()  # choices whose first chunk is sent
    async with aclosing(results):
        try:
            async for delta in results:
                usage.add(delta)
                first = None if delta.index in started else formatter.first_chunk(delta.index)
                started.add(delta.index)
                for choice in filter(None, (first, formatter.chunk(delta))):
                    yield _event({**head, "choices": [choice], **extra})
        except Exception as error:  # the status is sent already, so the error becomes an event
            yield _event(error_of_stream(error).body())
            return
    if with_usage:
        yield _event({**head, "choices": [], "usage": usage.to_json()})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
