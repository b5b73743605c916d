"""A proxy in front of `limbeck serve`: records requests, adds chat, and fails on demand."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from limbeck.distill.recipe.schema import Teacher
from limbeck.distill.teacher import endpoint
from limbeck.distill.teacher.answer_cache import AnswerCache
from limbeck.distill.teacher.endpoint import EndpointTeacher
from limbeck.registry.mlflow.store import Store

Body = dict[str, Any]


class EndpointProxy(ThreadingHTTPServer):
    """Forwards requests to another server, and records them.

    Attributes:
        script: how to answer the next POSTs: "ok", a status such as "429", "429:1" with Retry-After: 1, or "drop".
        posts: bodies of the requests answered with status 200, in order.
        times: when each POST arrived.
        refused: the actions of `script` that answered with an error.
        change: a function of request and answer that returns the answer to send.
        max_running: the largest number of requests at a time.
        hold: seconds that each request takes at least.
    """

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.target = urlsplit(url)
        self.script: list[str] = []
        self.posts: list[Body] = []
        self.times: list[float] = []
        self.refused: list[str] = []
        self.change: Callable[[Body, Body], Body] = lambda body, answer: answer
        self.lock = threading.Lock()
        self.running = self.max_running = 0
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
        """Ignore clients that disconnect."""


class ProxyHandler(BaseHTTPRequestHandler):
    server: EndpointProxy

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(*self.server.ask("GET", self.path, None, self.forwarded_headers()))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            action = self.server.script.pop(0) if self.server.script else "ok"
            self.server.running += 1
            self.server.max_running = max(self.server.max_running, self.server.running)
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

    def forwarded_headers(self) -> dict[str, str]:
        names = ("Authorization", "Content-Type")
        return {name: self.headers[name] for name in names if self.headers[name]}

    def forward(self, body: Body) -> tuple[int, Any]:
        if not self.path.endswith("/chat/completions"):
            return self.server.ask("POST", self.path, body, self.forwarded_headers())
        plain = {key: value for key, value in body.items() if key not in ("messages", "logprobs", "top_logprobs")}
        plain["prompt"] = "".join(f"<{turn['role']}>{turn['content']}\n" for turn in body["messages"])
        if body.get("logprobs"):
            plain["logprobs"] = body.get("top_logprobs", 0)
        status, answer = self.server.ask("POST", "/v1/completions", plain, self.forwarded_headers())
        if status == 200:
            answer["choices"] = [as_chat(choice) for choice in answer["choices"]]
        return status, answer

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def as_chat(choice: Body) -> Body:
    """A choice of /completions in the format of /chat/completions."""
    logprobs = choice.get("logprobs")
    pairs = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True) if logprobs else []
    return {
        "index": choice["index"],
        "message": {"role": "assistant", "content": choice["text"]},
        "finish_reason": choice["finish_reason"],
        "logprobs": {"content": [{"token": token, "logprob": value} for token, value in pairs]} if logprobs else None,
    }


def endpoint_teacher(proxy: EndpointProxy, store: Store, tokenizer: Path | None, **settings: Any) -> EndpointTeacher:
    teacher = Teacher(model=proxy.url, tokenizer=str(tokenizer) if tokenizer else None, **settings)
    return EndpointTeacher(endpoint.resolve_endpoint(teacher, Path(), store), teacher, AnswerCache())
