"""The route POST /v1/responses; answers are whole or streamed, and not kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from limbeck.export.server.hot_swap import ServedModel
from limbeck.export.server.openai.chat import stream_deltas
from limbeck.export.server.openai.completions import Delta, Usage
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.http import (
    await_first_delta,
    cancel_on_disconnect,
    check_model,
    error_of_stream,
    warn_of_unknown_fields,
)
from limbeck.export.server.openai.response_events import ResponseWriter
from limbeck.export.server.openai.responses import ResponsesRequest, name_own_fields


def add_response_routes(api: FastAPI, served: ServedModel) -> None:
    """Add the route. A request keeps the artifact that is served when it arrives."""

    @api.post("/v1/responses")
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        await warn_of_unknown_fields(request, body)
        check_model(served, body.model)
        loaded = served.current()
        chat = body.to_chat()
        try:
            prepared = await asyncio.to_thread(chat.prepare, loaded)
        except APIError as error:
            raise name_own_fields(error) from None
        usage = Usage(len(prepared.prompt))
        deltas = stream_deltas(loaded.scheduler, chat, prepared)
        writer = ResponseWriter(body, served.name, usage)
        if body.stream:
            deltas = await cancel_on_disconnect(request, await_first_delta(deltas))
            return StreamingResponse(_server_sent_events(writer, deltas, usage), media_type="text/event-stream")
        return JSONResponse(await cancel_on_disconnect(request, _whole(writer, deltas, usage)))


async def _events(writer: ResponseWriter, deltas: AsyncGenerator[Delta], usage: Usage) -> AsyncIterator[dict[str, Any]]:
    """The events of an answer."""
    for event in writer.start():
        yield event
    reason = None
    async with aclosing(deltas):
        async for delta in deltas:
            usage.add(delta)
            reason = delta.finish_reason
            for event in writer.add(delta):
                yield event
    for event in writer.finish(reason):
        yield event


async def _whole(writer: ResponseWriter, deltas: AsyncGenerator[Delta], usage: Usage) -> dict[str, Any]:
    """The whole answer: that of the last event."""
    answer: dict[str, Any] = {}
    async for event in _events(writer, deltas, usage):
        answer = event.get("response", answer)
    return answer


async def _server_sent_events(
    writer: ResponseWriter, deltas: AsyncGenerator[Delta], usage: Usage
) -> AsyncIterator[str]:
    """Format an answer as server-sent events."""
    try:
        async for event in _events(writer, deltas, usage):
            yield _format(event)
    except Exception as error:  # the status is sent already, so the error becomes an event
        yield _format(writer.fail(error_of_stream(error)))


def _format(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
