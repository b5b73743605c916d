"""Requests to a running `limbeck serve`, its metrics, and waiting for a state."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import httpx

from tests.export.export_helpers import Served


def body(prompt: Any = "def add(", new: int = 8, **settings: Any) -> dict[str, Any]:
    """The body of a greedy request for `new` tokens."""
    return {"prompt": prompt, "max_tokens": new, "temperature": 0} | settings


def complete(served: Served, **settings: Any) -> httpx.Response:
    """POST to /v1/completions; `settings` as in `body`."""
    return httpx.post(f"{served.url}/completions", json=body(**settings), timeout=60)


def root(served: Served) -> str:
    """The server's address without /v1."""
    return served.url.removesuffix("/v1")


def metric(served: Served, name: str) -> float:
    """The sum of a metric over its labels."""
    text = httpx.get(f"{root(served)}/metrics", timeout=60).text
    return sum(map(float, re.findall(rf"^limbeck:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))


def wait_until(holds: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until `holds` returns True; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the expected state was not reached"
        time.sleep(0.02)
