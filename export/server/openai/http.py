"""What the routes share: checks of a request, streams that wait for their first result, and disconnected clients."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import fields
from typing import Any

from fastapi import Request

from limbeck.export.server.hot_swap import ServedModel
from limbeck.export.server.openai.completions import Delta
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.requests import Unavailable
from limbeck.registry.core.errors import BadInput

log = logging.getLogger("limbeck.serve")
MAX_REPORTED_FIELDS = 1000  # a client may send any number of names
_reported_fields: set[str] = set()


def check_model(served: ServedModel, name: str | None) -> None:
    """Raise APIError if a request names a model that is not served."""
    if name not in (None, served.name):
        message = f"the model {name!r} is not served here; use {served.name!r}"
        raise APIError(404, message, "model", "model_not_found")


async def warn_of_unknown_fields(request: Request, body: Any) -> None:
    """Log the fields of a request that `body`, a dataclass, does not have; each once."""
    for name in (await request.json()).keys() - {field.name for field in fields(body)}:
        field_name = f"{type(body).__name__}.{name[:100]}"
        if field_name not in _reported_fields and len(_reported_fields) < MAX_REPORTED_FIELDS:
            _reported_fields.add(field_name)
            log.warning("%s: the field %r is not supported, and ignored", request.url.path, name[:100])


async def await_first_delta(results: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
    """Wait for the first delta, so that an error sets the status of the answer; return all deltas."""
    first = await anext(results)

    async def all_deltas() -> AsyncGenerator[Delta]:
        async with aclosing(results):
            yield first
            async for delta in results:
                yield delta

    return all_deltas()


def error_of_stream(error: Exception) -> APIError:
    """The error that ends a stream."""
    if isinstance(error, Unavailable):
        return APIError(error.status, str(error), code=error.code)
    if isinstance(error, BadInput):
        return APIError(400, error.message)
    return APIError(500, "internal error")


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`; cancels it when the client disconnects."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise APIError(499, "the client disconnected")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
