"""HTTP itself: methods, origins of browsers, forms of the key, and clients that do not finish their header."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from limbeck.export.server import protocol
from limbeck.export.server.protocol import Protocol
from tests.export.export_helpers import Exported, Served, serving

KEY = "k3y"
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def served(llama: Exported) -> Iterator[Served]:
    with serving(llama.fp32, KEY, "--cors", PAGE) as running:
        yield running


def get(served: Served, path: str = "/models", method: str = "GET", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, f"{served.url}{path}", headers=named, timeout=30)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_scheme_of_the_key_is_read_in_any_case(served: Served, scheme: str) -> None:
    assert get(served, authorization=f"{scheme} {KEY}").status_code == 200


@pytest.mark.parametrize("given", [KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}x", f"Bearer{KEY}"])
def test_other_schemes_and_keys_are_refused(served: Served, given: str) -> None:
    assert get(served, authorization=given).status_code == 401


def test_head_is_answered_as_get_without_a_body(served: Served) -> None:
    key = f"Bearer {KEY}"
    for path in ("/models", "/nothing", "/completions"):
        head, whole = (get(served, path, method, authorization=key) for method in ("HEAD", "GET"))
        assert (head.status_code, head.content) == (whole.status_code, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]
    assert get(served, method="HEAD").status_code == 401


def test_pages_of_the_given_origins_may_use_the_server(served: Served) -> None:
    asked = dict(access_control_request_method="POST", access_control_request_headers="authorization,content-type")
    allowed = get(served, "/completions", "OPTIONS", origin=PAGE, **asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert get(served, "/completions", "OPTIONS", origin="https://other.example", **asked).status_code == 400
    for key in (KEY, "wrong"):  # refusals are for the page to read, too
        assert get(served, origin=PAGE, authorization=f"Bearer {key}").headers["access-control-allow-origin"] == PAGE
    assert "access-control-allow-origin" not in get(served, origin="https://other.example").headers


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.parametrize("whole", [0, 2])
@pytest.mark.parametrize("part", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_header_that_is_not_finished_ends_its_connection(
    whole: int, part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind whole requests, and if a byte arrives now and then; without a byte it is idle."""
    monkeypatch.setattr(protocol, "HEADER_TIMEOUT_S", 0.3)

    async def slow_client() -> bytes:
        config = uvicorn.Config(answer, http=Protocol, lifespan="off", log_level="error", timeout_keep_alive=1)
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.ensure_future(server._serve([listener]))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            for _ in range(whole):
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200 ")
            writer.write(part)
            reading = asyncio.ensure_future(reader.read())
            while not reading.done():
                writer.write(part[-1:])
                await asyncio.sleep(0.05)
            writer.close()
            server.should_exit = True
            await serving
        return await reading

    refusal = asyncio.run(asyncio.wait_for(slow_client(), 20))
    assert refusal.startswith(b"HTTP/1.1 408 ") == (not whole or bool(part))
