"""`limbeck ui`: the process, its token and its exit."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import httpx
import pytest

from limbeck.registry.mlflow.store import Store
from tests import ROOT
from tests.conftest import Result
from tests.web.conftest import TOKEN


def test_ui_prints_its_address_and_token_and_ends_with_ctrl_c(store: Store) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LIMBECK_UI_TOKEN"}
    command = [sys.executable, "-m", "limbeck", "ui", "--port", "0"]
    environment["PYTHONPATH"] = str(ROOT)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        address = process.stderr.readline().strip()
        token = process.stderr.readline().split()[-1]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert len(token) >= 32
        with httpx.Client(base_url=address, headers={"Origin": address.rstrip("/")}, trust_env=False) as visitor:
            assert visitor.get("/").status_code == 200
            assert visitor.post("/login", data={"token": token + "x"}).status_code == 403
            answer = visitor.post("/login", data={"token": token})
            assert answer.status_code == 303
            assert token not in str(answer.headers)
            assert "Log out" in visitor.get("/requests").text
        process.send_signal(signal.SIGINT)
        assert (process.wait(timeout=30), process.stderr.read()) == (0, "stopped\n")


def test_ui_imports_no_torch_transformers_or_mlflow() -> None:
    heavy = "print({'torch', 'transformers', 'mlflow'} & sys.modules.keys())"
    code = f"import sys, limbeck.web.cli, limbeck.web.app, limbeck.export.server.app; {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_a_taken_port_a_missing_policy_and_a_short_token_are_reported_at_once(
    store: Store, limbeck: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_UI_TOKEN", TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = limbeck("ui", "--port", taken.getsockname()[1])
    assert result.code == 2
    assert "Address already in use" in result.err
    assert "--port" in result.err
    assert TOKEN not in result.err
    result = limbeck("ui", "--policy", "nowhere.toml", "--port", 0)
    assert (result.code, "nowhere.toml" in result.err) == (2, True)
    monkeypatch.setenv("LIMBECK_UI_TOKEN", "short")
    result = limbeck("ui", "--port", 0)
    assert (result.code, "it needs at least 16" in result.err) == (2, True)
