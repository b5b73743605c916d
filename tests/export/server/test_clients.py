"""The server process with many, slow, stalled and disconnecting clients; its metrics, limits and shutdown."""

from __future__ import annotations

import json
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

from limbeck.export.runtime.runtime import Runtime
from limbeck.export.server.app import open_listener
from tests.conftest import TEXT
from tests.export.export_helpers import Served, serving
from tests.export.server.client_helpers import body, complete, metric, root, wait_until


@pytest.fixture(scope="module")
def served(boundless: Path) -> Iterator[Served]:
    limits = ("--max-num-seqs", 8, "--max-queue", 4, "--max-new-tokens", 150_000, "--max-prompt-tokens", 100)
    with serving(boundless, "", *limits) as running:
        yield running


def test_many_clients_at_once_get_the_answers_of_the_runtime(served: Served, boundless: Path) -> None:
    runtime = Runtime.load(boundless, threads=1)
    prompts = [text[: 10 + 5 * i] for i, text in enumerate(TEXT)] * 2
    expected = [done.text for done in (runtime.generate([prompt], max_new_tokens=30)[0] for prompt in prompts)]
    before = metric(served, "generation_tokens_total")
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(served, prompt=prompt, new=30).json(), prompts))
    assert [answer["choices"][0]["text"] for answer in answers] == expected
    generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert metric(served, "generation_tokens_total") - before == generated


def test_metrics_are_prometheus_text(served: Served) -> None:
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
        streams = [pool.submit(_read_stream, url, body(new=100_000, stream=True), leave) for _ in range(12)]
        try:
            wait_until(lambda: metric(served, "num_requests_waiting") == 4)
            for stream in (False, True):
                answer = client.post(url, json=body(new=1, stream=stream))
                assert answer.status_code == 429
                assert answer.json()["error"]["code"] == "rate_limit_exceeded"
                assert 1 <= int(answer.headers["retry-after"]) <= 60
        finally:
            leave.set()
        assert max(stream.result() for stream in streams) == 200
    wait_until(lambda: metric(served, "num_rows_running") == 0)  # the rows of disconnected clients are free at once
    assert complete(served).status_code == 200


def _read_stream(url: str, request: dict[str, Any], leave: threading.Event) -> int:
    """Read a stream until `leave` is set, or give up after 2 s without an answer. Returns the status, or 0."""
    try:
        with httpx.stream("POST", url, json=request, timeout=httpx.Timeout(60, read=2)) as answer:
            for _ in answer.iter_lines():
                if leave.is_set():
                    break
            return answer.status_code
    except httpx.ReadTimeout:
        return 0


@pytest.mark.parametrize(
    ("settings", "message"), [({"new": 10**6}, "new tokens"), ({"prompt": "x" * 300}, "300 tokens")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_beyond_the_limits_are_refused(
    served: Served, settings: dict[str, Any], message: str, stream: bool
) -> None:
    answer = complete(served, **settings, stream=stream)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_stalled_clients_and_a_thousand_connections_do_not_block_others(served: Served) -> None:
    port = httpx.URL(served.url).port
    sockets = [_connect(port, 4096 if number < 2 else None) for number in range(1000)]
    try:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: 1000\r\n\r\n"
        for stalled in sockets[2:50]:
            stalled.sendall(head + b'{"prompt": "x')
        request = json.dumps(body(new=100_000, stream=True, logprobs=5)).encode()  # long events fill buffers sooner
        for unread in sockets[:2]:  # these request a long stream and read nothing of it
            unread.sendall(head.replace(b"1000", str(len(request)).encode()) + request)
        wait_until(lambda: metric(served, "num_rows_running") == 2)
        # The two rows pause when nobody reads, long before their ends.
        counts = [0.0]

        def is_paused() -> bool:
            time.sleep(0.3)
            counts.append(metric(served, "generation_tokens_total"))
            return counts[-1] == counts[-2]

        wait_until(is_paused)
        assert complete(served, new=50).json()["usage"]["completion_tokens"] == 50
    finally:
        for connection in sockets:
            connection.close()
    wait_until(lambda: metric(served, "num_rows_running") == 0)


def _connect(port: int | None, receive_buffer: int | None) -> socket.socket:
    """Connect to the server; `receive_buffer` in bytes, None for the default."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", port))
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_when_its_client_disconnects(served: Served, stream: bool) -> None:
    url, request = f"{served.url}/completions", body(new=100_000, stream=stream)
    if stream:
        with httpx.stream("POST", url, json=request, timeout=30) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=request, timeout=httpx.Timeout(30, read=0.5))
    wait_until(lambda: metric(served, "num_rows_running") == 0)
    assert complete(served, new=2).json()["usage"]["completion_tokens"] >= 1


def test_a_request_that_takes_too_long_is_504(boundless: Path) -> None:
    with serving(boundless, "", "--timeout", 0.4) as running:
        answer = complete(running, new=100_000)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        lines = complete(running, new=100_000, stream=True).text.split("\n\n")
        assert json.loads(lines[0].removeprefix("data: "))["choices"]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert complete(running).status_code == 200


def test_sigterm_finishes_running_and_waiting_requests_and_refuses_new_ones(boundless: Path) -> None:
    with serving(boundless, "", "--max-num-seqs", 1) as running, ThreadPoolExecutor(2) as pool:
        url, request = f"{running.url}/completions", body(new=1500, stream=True)
        with httpx.stream("POST", url, json=request, timeout=60) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            waiting = [pool.submit(complete, running, new=1500) for _ in range(2)]
            wait_until(lambda: metric(running, "num_requests_waiting") == 2)
            running.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{root(running)}/ready").status_code == 503)
            assert httpx.get(f"{root(running)}/health").status_code == 200
            late = complete(running)
            assert (late.status_code, late.headers["retry-after"]) == (503, "1")
            assert late.json()["error"]["type"] == "server_error"
            events = [line for line in [first, *lines] if line]
        assert events[-1] == "data: [DONE]"
        assert len(events) == 1500 + 1
        assert [done.result().json()["usage"]["completion_tokens"] for done in waiting] == [1500] * 2
        assert running.process.wait(timeout=20) == 0
        assert running.process.stderr is not None
        assert "Traceback" not in running.process.stderr.read()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/models")


def test_accepted_connections_send_at_once_and_have_a_small_send_buffer() -> None:
    with open_listener("127.0.0.1", 0) as listener:
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 2**20
