"""Webhooks: a real server sends notices to a real receiver."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.conftest import Result

pytestmark = [pytest.mark.server, pytest.mark.timeout(280)]


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """An address, and the list of what it receives: headers and body."""
    received: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/notices", received
        server.shutdown()


def test_notices_are_sent_and_signed(
    log_in: Callable[..., None],
    limbeck: Callable[..., Result],
    receiver: tuple[str, list[tuple[dict[str, str], bytes]]],
    make_folder: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, received = receiver
    monkeypatch.setenv("LIMBECK_WEBHOOK_SECRET", "known to both")
    log_in("ann")
    refused = limbeck("webhooks", "add", url, "--event", "promoted")
    assert (refused.code, "does not let ann do this (webhooks)" in refused.err) == (2, True), refused.err
    log_in("admin")
    added = limbeck("webhooks", "add", url, "--event", "promoted", "--event", "registered", "--format", "json")
    assert added.code == 0, added.err
    (webhook,) = json.loads(added.out)
    assert (webhook["url"], sorted(webhook["events"])) == (url, ["promoted", "registered"])
    assert "known to both" not in added.out + added.err + limbeck("webhooks", "list", "--format", "json").out
    assert limbeck("webhooks", "add", url, "--event", "registered", "--event", "promoted").code == 2  # it exists
    assert limbeck("webhooks", "test", webhook["id"]).code == 0
    assert len(received) == 1

    log_in("ann")
    Store().register(NewVersion(name="noticed", kind="onnx", engine="onnxruntime"), make_folder("a"))
    Store().client.set_registered_model_alias("noticed", "production", "1")
    deadline = time.monotonic() + 60
    while len(received) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    events = {
        (notice["entity"], notice["action"]): notice["data"]
        for notice in (json.loads(body) for _, body in received[1:])
    }
    assert events["model_version", "created"]["name"] == "noticed"
    assert events["model_version_alias", "created"] | {} == {"name": "noticed", "alias": "production", "version": "1"}
    for headers, body in received:
        signed = f"{headers['X-MLflow-Delivery-Id']}.{headers['X-MLflow-Timestamp']}.{body.decode()}"
        expected = hmac.new(b"known to both", signed.encode(), hashlib.sha256).digest()
        assert headers["X-MLflow-Signature"] == "v1," + base64.b64encode(expected).decode()

    log_in("admin")
    assert limbeck("webhooks", "remove", webhook["id"]).code == 0
    assert json.loads(limbeck("webhooks", "list", "--format", "json").out) == []
    assert limbeck("webhooks", "remove", webhook["id"]).code == 2


@pytest.mark.parametrize("url", ["http://example.com/x", "ftp://127.0.0.1", "nowhere", "https://"])
def test_addresses_that_cannot_be_used(log_in: Callable[..., None], limbeck: Callable[..., Result], url: str) -> None:
    log_in("admin")
    result = limbeck("webhooks", "add", url, "--event", "promoted")
    assert (result.code, "is not an address for notices" in result.err) == (2, True)
