"""Admission: a request body must arrive in time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI, Request

from limbeck.export.server.admission import Admission
from limbeck.export.server.metrics import Metrics


@pytest.mark.parametrize("chunks", [0, 1])
def test_a_body_that_stalls_is_408(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.export.server.admission.BODY_TIMEOUT_S", 0.1)
    api = FastAPI()

    @api.post("/v1/completions")
    async def read_body(request: Request) -> int:
        return len(await request.body())

    sent: list[Any] = []
    unread = [{"type": "http.request", "body": b"{", "more_body": True}] * chunks

    async def receive() -> Any:
        return unread.pop() if unread else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    admission = Admission(api, Metrics(), None, 100)
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    asyncio.run(admission(scope, receive, send))
    assert sent[0]["status"] == 408
    assert admission.running_requests == 0
