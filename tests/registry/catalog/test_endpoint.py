"""Requests to OpenAI-compatible servers: retries, refusals, the API key, and which model a URL names.

See also tests/evals/engines/test_endpoint.py and tests/distill/teacher/test_endpoint.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from limbeck.registry.catalog import endpoint
from limbeck.registry.catalog.endpoint import EndpointClient, find_endpoint
from limbeck.registry.core.errors import BadInput, Unreachable

KEY = "sk-secret"
Answer = tuple[int, dict[str, str], str]  # status, headers, body
MODELS = json.dumps({"data": [{"id": "small", "max_model_len": 512}, {"id": "large"}]})


class FakeServer(ThreadingHTTPServer):
    """Gives the answers of a list, one after the other; then the list of its models."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = []
        self.keys: list[str | None] = []  # the Authorization header of each request
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        answers = self.server.answers or [(200, {}, MODELS)]
        status, headers, body = answers.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A running server; the client has the API key and short pauses."""
    monkeypatch.setenv(endpoint.API_KEY_VARIABLE, KEY)
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.01)
    with FakeServer() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_temporary_failures_are_retried(server: FakeServer) -> None:
    server.answers = [(503, {}, "busy"), (429, {"Retry-After": "0"}, "slow down"), (200, {}, '{"answer": 1}')]
    assert EndpointClient(server.url).request_json("/models") == {"answer": 1}
    assert server.keys == [f"Bearer {KEY}"] * 3


def test_the_last_failure_is_reported_without_the_key(server: FakeServer) -> None:
    server.answers = [(500, {}, f"the key {KEY} broke it")] * 2
    with pytest.raises(Unreachable, match=r"cannot be used: 500 the key \*\*\* broke it"):
        EndpointClient(server.url).request_json("/models", tries=2)
    server.answers = [(429, {"Retry-After": "3600"}, "slow down")]
    with pytest.raises(Unreachable, match="its Retry-After is 3600 s"):
        EndpointClient(server.url).request_json("/models")


def test_refusals_are_not_retried(server: FakeServer) -> None:
    for status, message in ((401, "refuses the API key: 401 no"), (404, "refuses the request: 404 no")):
        server.answers = [(status, {}, json.dumps({"error": {"message": "no"}}))]
        with pytest.raises(BadInput, match=message):
            EndpointClient(server.url).request_json("/models")
    server.answers = [(200, {}, "<html>")]
    with pytest.raises(Unreachable, match="does not answer with JSON"):
        EndpointClient(server.url).request_json("/models")


def test_the_model_that_a_url_names(server: FakeServer) -> None:
    found = find_endpoint(f"{server.url}/completions#small")
    assert (found.url, found.name, found.context, found.label) == (server.url, "small", 512, f"{server.url}#small")
    with pytest.raises(BadInput, match=r"serves 2 models\n.*it serves small, large"):
        find_endpoint(server.url)
    with pytest.raises(BadInput, match="does not serve 'huge'"):
        find_endpoint(f"{server.url}#huge")
    with pytest.raises(BadInput, match="no password or query") as refused:
        find_endpoint(f"http://user:{KEY}@host/v1")
    assert KEY not in str(refused.value)


def test_answers_of_running_requests_are_yielded_before_a_failure_is_raised(server: FakeServer) -> None:
    second_may_end = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            raise ValueError("failed")
        second_may_end.wait(10)
        return item

    answers = []
    with pytest.raises(ValueError, match="failed"):  # noqa: PT012 (the answers come before it)
        threading.Timer(0.1, second_may_end.set).start()
        for index, answer in EndpointClient(server.url, num_concurrent=2).map_concurrently(work, [0, 1, 2, 3]):
            answers.append((index, answer))
    assert answers == [(1, 1)]
