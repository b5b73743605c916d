"""A server before `limbeck serve`: it counts, speaks chat too, and fails where a test wants it to."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Body = dict[str, Any]


class Front(ThreadingHTTPServer):
    """Forwards to another server; the next POSTs are answered as `script` says first: a status, or "429:1" with
    Retry-After, or "drop".

    Attributes:
        posts: bodies of the requests that were answered well, as they came; `times`, when.
        change: what becomes of a whole answer.
        most: the most requests at a time. hold: seconds that each takes at least.
    """

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = urlsplit(url)
        self.script: list[str] = []
        self.posts: list[Body] = []
        self.times: list[float] = []
        self.refused: list[str] = []
        self.change: Callable[[Body, Body], Body] = lambda body, answer: answer
        self.lock = threading.Lock()
        self.running = self.most = 0
        self.hold = 0.0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def ask(self, method: str, path: str, body: Body | None, headers: dict[str, str]) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.target.hostname or "", self.target.port, timeout=60)
        connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Front

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(*self.server.ask("GET", self.path, None, self.passed_on()))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            action = self.server.script.pop(0) if self.server.script else "ok"
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
            self.server.times.append(time.monotonic())
        try:
            if self.server.hold:
                time.sleep(self.server.hold)
            if action == "drop":
                self.connection.close()
                return
            if action != "ok":
                self.server.refused.append(action)
                status, _, wait = action.partition(":")
                self.answer(int(status), {"error": {"message": "not now"}}, {"Retry-After": wait} if wait else {})
                return
            status, answer = self.forward(body)
            with self.server.lock:
                self.server.posts += [body] if status == 200 else []
            self.answer(status, self.server.change(body, answer) if status == 200 else answer)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def passed_on(self) -> dict[str, str]:
        names = ("Authorization", "Content-Type")
        return {name: self.headers[name] for name in names if self.headers[name]}

    def forward(self, body: Body) -> tuple[int, Any]:
        if not self.path.endswith("/chat/completions"):
            return self.server.ask("POST", self.path, body, self.passed_on())
        plain = {key: value for key, value in body.items() if key not in ("messages", "logprobs", "top_logprobs")}
        plain["prompt"] = "".join(f"<{turn['role']}>{turn['content']}\n" for turn in body["messages"])
        if body.get("logprobs"):
            plain["logprobs"] = body.get("top_logprobs", 0)
        status, answer = self.server.ask("POST", "/v1/completions", plain, self.passed_on())
        if status == 200:
            answer["choices"] = [as_chat(choice) for choice in answer["choices"]]
        return status, answer

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        said = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(said)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said)


def as_chat(choice: Body) -> Body:
    """A choice of /completions as one of /chat/completions."""
    told = choice.get("logprobs")
    pairs = zip(told["tokens"], told["token_logprobs"], strict=True) if told else []
    return {
        "index": choice["index"],
        "message": {"role": "assistant", "content": choice["text"]},
        "finish_reason": choice["finish_reason"],
        "logprobs": {"content": [{"token": token, "logprob": value} for token, value in pairs]} if told else None,
    }
