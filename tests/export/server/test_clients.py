"""The server as a process among clients of all kinds: many, slow, silent, late, and those that watch it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from limbeck.export.runtime.runtime import Runtime
from limbeck.export.server.admission import Admission
from limbeck.export.server.app import open_listener
from limbeck.export.server.metrics import Metrics
from tests.conftest import TEXT
from tests.export.export_helpers import Served, serving


@pytest.fixture(scope="module")
def served(boundless: Path) -> Iterator[Served]:
    limits = ("--max-num-seqs", 8, "--max-queue", 4, "--max-new-tokens", 150_000, "--max-prompt-tokens", 100)
    with serving(boundless, "", *limits) as running:
        yield running


def body(prompt: Any = "def add(", new: int = 8, **settings: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": new, "temperature": 0} | settings


def complete(served: Served, **settings: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/completions", json=body(**settings), timeout=60)


def root(served: Served) -> str:
    return served.url.removesuffix("/v1")


def metric(served: Served, name: str) -> float:
    """The sum of a metric over its labels."""
    text = httpx.get(f"{root(served)}/metrics", timeout=60).text
    return sum(map(float, re.findall(rf"^limbeck:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))


def until(holds: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


def test_answers_to_many_clients_at_once_are_those_of_the_runtime(served: Served, boundless: Path) -> None:
    runtime = Runtime.load(boundless, threads=1)
    prompts = [text[: 10 + 5 * i] for i, text in enumerate(TEXT)] * 2
    expected = [done.text for done in (runtime.generate([prompt], max_new_tokens=30)[0] for prompt in prompts)]
    before = metric(served, "generation_tokens_total")
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(served, prompt=prompt, new=30).json(), prompts))
    assert [answer["choices"][0]["text"] for answer in answers] == expected
    made = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert metric(served, "generation_tokens_total") - before == made


def test_the_metrics_are_prometheus_text(served: Served) -> None:
    complete(served, prompt="x")
    complete(served, prompt=[-1])
    httpx.get(f"{root(served)}/no/such/path/{time.time()}")
    answer = httpx.get(f"{root(served)}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    paths = {(sample.labels["path"], sample.labels["status"]) for sample in families["limbeck:http_requests"].samples}
    assert {("/v1/completions", "200"), ("/v1/completions", "400"), ("other", "404")} <= paths
    (info,) = families["limbeck:model_info"].samples
    assert info.labels["name"] == info.labels["version"] == "fp32"
    assert len(info.labels["digest"]) == 64
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        counts = [s.value for s in families[f"limbeck:{name}_seconds"].samples if s.name.endswith("_count")]
        assert counts[0] > 0
    assert httpx.get(f"{root(served)}/ready").json()["status"] == "ready"


def test_a_full_queue_is_429_with_retry_after(served: Served) -> None:
    url = f"{served.url}/completions"
    with ThreadPoolExecutor(16) as pool, httpx.Client(timeout=60) as client:
        leave = threading.Event()
        hold = [pool.submit(_until_told, url, body(new=100_000, stream=True), leave) for _ in range(12)]
        try:
            until(lambda: metric(served, "num_requests_waiting") == 4)
            for stream in (False, True):
                answer = client.post(url, json=body(new=1, stream=stream))
                assert answer.status_code == 429
                assert answer.json()["error"]["code"] == "rate_limit_exceeded"
                assert 1 <= int(answer.headers["retry-after"]) <= 60
        finally:
            leave.set()
        assert sorted(done.result() for done in hold)[-1] == 200
    until(lambda: metric(served, "num_rows_running") == 0)  # they left, and their rows are free at once
    assert complete(served).status_code == 200


def _until_told(url: str, request: dict[str, Any], leave: threading.Event) -> int:
    """Read a stream until told to leave. A request that waits is left when its time is up."""
    try:
        with httpx.stream("POST", url, json=request, timeout=httpx.Timeout(60, read=2)) as answer:
            for _ in answer.iter_lines():
                if leave.is_set():
                    break
            return answer.status_code
    except httpx.ReadTimeout:
        return 0


@pytest.mark.parametrize(("settings", "words"), [({"new": 10**6}, "new tokens"), ({"prompt": "x" * 300}, "300 tokens")])
@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_server_gives_is_refused(
    served: Served, settings: dict[str, Any], words: str, stream: bool
) -> None:
    answer = complete(served, **settings, stream=stream)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_clients_that_stall_and_a_thousand_connections_hold_nobody_up(served: Served) -> None:
    port = httpx.URL(served.url).port
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(1000)]
    try:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: 1000\r\n\r\n"
        for stalled in sockets[:50]:
            stalled.sendall(head + b'{"prompt": "x')
        request = json.dumps(body(new=100_000, stream=True)).encode()
        for unread in sockets[50:52]:  # they ask for a long stream and read none of it
            unread.sendall(head.replace(b"1000", str(len(request)).encode()) + request)
        until(lambda: metric(served, "num_rows_running") == 2)
        # The rows of those two stop when nobody reads, long before their ends.
        seen = [0.0]

        def still() -> bool:
            time.sleep(0.3)
            seen.append(metric(served, "generation_tokens_total"))
            return seen[-1] == seen[-2]

        until(still)
        assert complete(served, new=50).json()["usage"]["completion_tokens"] == 50
    finally:
        for connection in sockets:
            connection.close()
    until(lambda: metric(served, "num_rows_running") == 0)


def test_a_request_that_takes_too_long_is_504(boundless: Path) -> None:
    with serving(boundless, "", "--timeout", 0.4) as running:
        answer = complete(running, new=100_000)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        lines = complete(running, new=100_000, stream=True).text.split("\n\n")
        assert json.loads(lines[0].removeprefix("data: "))["choices"]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert complete(running).status_code == 200


def test_sigterm_lets_what_runs_and_waits_end_and_tells_others(boundless: Path) -> None:
    with serving(boundless, "", "--max-num-seqs", 1) as running, ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(complete, running, new=1500) for _ in range(3)]
        until(lambda: metric(running, "num_requests_waiting") == 2)
        running.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{root(running)}/ready").status_code == 503)
        assert httpx.get(f"{root(running)}/health").status_code == 200
        late = complete(running)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert late.json()["error"]["type"] == "server_error"
        assert [done.result().json()["usage"]["completion_tokens"] for done in waits] == [1500] * 3
        assert running.process.wait(timeout=20) == 0


def test_small_pieces_are_sent_at_once_and_a_slow_reader_fills_no_megabytes() -> None:
    with open_listener("127.0.0.1", 0) as listener:
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 2**20


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_body_that_does_not_come_whole_is_408(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a body that stalls is not waited for."""
    monkeypatch.setattr("limbeck.export.server.admission.BODY_TIMEOUT_S", 0.1)
    api = FastAPI()

    @api.post("/v1/completions")
    async def taken(request: Request) -> int:
        return len(await request.body())

    sent: list[Any] = []
    left = [{"type": "http.request", "body": b"{", "more_body": True}] * pieces

    async def receive() -> Any:
        return left.pop() if left else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    gate = Admission(api, Metrics(), None, 100)
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    asyncio.run(gate(scope, receive, send))
    assert sent[0]["status"] == 408
    assert gate.running_requests == 0
