"""A way to a server that can be cut: an HTTP proxy that counts, and that stops answering when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

NOT_PASSED_ON = {"transfer-encoding", "content-length", "content-encoding", "connection", "server", "date"}


class Flaky(ThreadingHTTPServer):
    """Passes requests on to the server at `target`.

    Args:
        target: its address.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"
        self.puts: list[str] = []  # the files that were sent
        self.answers: list[int] = []  # status codes to give instead of passing on, first to last
        self.cut_after: int | None = None  # so many PUTs, nothing is answered any more
        self.reached = threading.Event()  # it is cut
        self.lost: set[str] = set()  # ends of paths that are passed on once, and whose answers get lost

    def handle_error(self, *_: Any) -> None:
        """A client that went away is what is tried here."""


@contextmanager
def flaky(target: str) -> Iterator[Flaky]:
    """A proxy before `target`, while the block runs."""
    with Flaky(target) as proxy:
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Flaky
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
        kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        answer = requests.request(self.command, proxy.target + self.path, headers=kept, data=body, timeout=60)
        if ends := {end for end in proxy.lost if self.path.endswith(end)}:
            proxy.lost -= ends
            self.close_connection = True
            return
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name.lower() not in NOT_PASSED_ON:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, *_: Any) -> None:
        pass
