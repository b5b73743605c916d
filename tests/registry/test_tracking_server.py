"""A tracking server: one that does not answer, and a real one on loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import requests

from registry import ledger
from registry.digest import folder_digest
from registry.errors import DamagedArtifact, Unreachable
from registry.home import home
from registry.promotion import promote, rollback
from registry.store import Store
from tests.conftest import Result
from tests.registry.conftest import POLICY, Still


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.timeout(30)  # MLflow alone would try for minutes
def test_no_answer(limbeck_home: Path, silent: int) -> None:
    with pytest.raises(Unreachable, match=r"no answer within 4 s\n.*MLFLOW_TRACKING_URI"):
        Store(f"http://127.0.0.1:{silent}")
    with pytest.raises(Unreachable, match="connection refused"):
        Store(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unreachable, match="does not answer"):
        Store("http://nowhere.invalid")


def test_no_answer_is_told_to_the_user(
    limbeck_home: Path, limbeck: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for command in (["models", "list"], ["rollback", "still"], ["models", "history", "still"]):
        result = limbeck(*command)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"error: the tracking server {uri} does not answer: connection refused\n")
    result = limbeck("doctor")
    assert result.code == 1
    assert "tracking store: start it, correct MLFLOW_TRACKING_URI" in result.err


class Server(NamedTuple):
    """Where a server is, and the folder that its artifacts lie in."""

    uri: str
    files: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    """A real `mlflow server` on loopback; SQLite and a folder of artifacts behind it."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    uri = f"http://127.0.0.1:{free_port()}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", uri.rpartition(":")[2]),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")),
        *("--workers", "1"),
    ]
    quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    quiet.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=quiet, stdout=log, stderr=log)
    try:
        while not answers(uri):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield Server(uri, folder / "files")
    finally:
        process.terminate()
        process.wait(30)


def answers(uri: str) -> bool:
    try:
        return requests.get(f"{uri}/health", timeout=1).ok
    except requests.RequestException:
        return False


@pytest.fixture
def store(server: Server, limbeck_home: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """In this file: the store behind the server, with an empty state folder here."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    return Store()


def test_the_whole_gate_through_a_server(
    server: Server, store: Store, scored: Still, limbeck: Callable[..., Result]
) -> None:
    assert store.is_server
    int8 = scored.variants["int8"]
    assert store.get(int8.ref) == int8
    assert not store.is_local(int8)
    folder = store.folder(int8)
    assert folder.is_relative_to(home() / "artifacts-cache")
    assert folder_digest(folder) == int8.digest
    (folder / "model.onnx").write_text("damaged here")
    assert folder_digest(store.folder(int8)) == int8.digest  # fetched again

    promote(store, "still/3", "production", POLICY)
    promote(store, "still", "production", POLICY)
    assert store.get("still@production").ref == int8.ref
    rollback(store, "still", "production")
    store.client.set_registered_model_alias("still", "production", "5")
    assert limbeck("models", "history", "still", "--verify").code == 1
    ledger.adopt(store, "still", "production", who="me", reason="")
    assert ledger.read(store, "still").problems() == []

    shutil.rmtree(home())  # another machine
    found = {each.version.ref: each for each in Store().found("still")}  # fetched
    assert found[int8.ref].scorecards == Store().scorecards(int8) == scored.store.scorecards(int8)
    assert found[int8.ref].version == store.get(int8.ref)
    listed = limbeck("models", "list", "still")
    assert (listed.code, listed.out.count("still/")) == (0, 5 + 4)
    doctor = limbeck("doctor", "--deep")
    assert (doctor.code, "their digests verified" in doctor.out) == (0, True)

    for file in server.files.rglob("model.onnx"):
        file.write_text("damaged there")
    shutil.rmtree(home() / "artifacts-cache")
    with pytest.raises(DamagedArtifact):
        store.folder(int8)
    assert not (home() / "artifacts-cache" / int8.digest).exists()
