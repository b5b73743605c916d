"""An HTTP proxy for tests: it counts uploads, loses answers and stops answering on command."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

DROPPED_HEADERS = {"transfer-encoding", "content-length", "content-encoding", "connection", "server", "date"}


class FlakyProxy(ThreadingHTTPServer):
    """Passes requests on to the server at the address `target`, and fails as its attributes say."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"
        self.puts: list[str] = []  # the names of the uploaded files
        self.answers: list[int] = []  # status codes of the next answers; these requests are not passed on
        self.cut_after: int | None = None  # after this number of PUTs, no request is answered
        self.reached = threading.Event()  # set when that happens
        self.lost: set[str] = set()  # the next request whose path ends so is passed on, but its answer is lost

    def handle_error(self, *_: Any) -> None:
        """Print nothing: tests kill clients on purpose."""


@contextmanager
def flaky_proxy(target: str) -> Iterator[FlakyProxy]:
    """Run a proxy for `target` while the block runs."""
    with FlakyProxy(target) as proxy:
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: FlakyProxy
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        proxy = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if proxy.cut_after is not None and len(proxy.puts) >= proxy.cut_after:
            proxy.reached.set()
            self.close_connection = True
            return
        if self.command == "PUT":
            proxy.puts.append(self.path.rpartition("/")[2])
        if proxy.answers:
            self.send_response(proxy.answers.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        answer = requests.request(self.command, proxy.target + self.path, headers=headers, data=body, timeout=60)
        if ends := {end for end in proxy.lost if self.path.endswith(end)}:
            proxy.lost -= ends
            self.close_connection = True
            return
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name.lower() not in DROPPED_HEADERS:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, *_: Any) -> None:
        pass
