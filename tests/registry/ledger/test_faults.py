"""Killed between any two steps, many at once, a server that dies, a full disk: no entry is lost, no move half made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from limbeck.registry.core.home import home
from limbeck.registry.gate.promotion import promote, rollback
from limbeck.registry.ledger import log
from limbeck.registry.ledger.chain import Ledger
from limbeck.registry.mlflow.store import Store
from tests import ROOT
from tests.registry.conftest import POLICY, Still, make_artifact, make_still

Answers = list[dict[str, Any]]
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def run_faulty() -> Iterator[Callable[..., Answers]]:
    """Runs a command in processes of its own, see tests/registry/ledger/faults.py."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.registry.ledger.faults"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "ready\n"

    def run(**command: Any) -> Answers:
        folder = command.pop("home", str(home()))
        uri = command.pop("uri", f"sqlite:///{home() / 'mlflow.db'}")
        process.stdin.write(json.dumps(command | {"home": folder, "uri": uri}) + "\n")
        process.stdin.flush()
        answers: Answers = json.loads(process.stdout.readline())
        return answers

    yield run
    process.stdin.close()
    assert process.wait(30) == 0


def kill_everywhere(run_faulty: Callable[..., Answers], was: int | None, now: int | None, **command: Any) -> int:
    """Kill a command before each call that changes something, each time from the same state. Returns these calls."""
    database, backup = home() / "mlflow.db", home() / "backup.db"
    shutil.copy(database, backup)
    before = run_faulty(do="nothing")[0]["entries"]
    for step in range(1, 40):
        shutil.copy(backup, database)
        (dead,) = run_faulty(die=step, **command)
        # The next command: version 5 does not pass, but it finishes the pending move.
        (after,) = run_faulty(do="promote", to=5, look=True)
        seen = after["before"]
        assert (seen["problems"], seen["entries"][: len(before)]) == ([], before)
        assert seen["at"] in (was, now)
        assert len(seen["entries"]) - len(before) in (0, 1)
        assert (after["code"], after["problems"], after["entries"]) == (1, [], seen["entries"])
        assert after["at"] == (now if len(seen["entries"]) > len(before) else was)
        if dead["status"] == 0:
            assert (dead["at"], dead["entries"]) == (now, seen["entries"])
            return step - 1
        assert dead["status"] == KILLED
    raise AssertionError("the command never finished")


def test_killed_in_a_promotion(run_faulty: Callable[..., Answers], scored: Still) -> None:
    promote(scored.store, "still/3", "production", POLICY)
    assert kill_everywhere(run_faulty, 3, 4, do="promote", to=4) >= 7


@pytest.mark.slow
def test_killed_in_a_rollback(run_faulty: Callable[..., Answers], scored: Still) -> None:
    promote(scored.store, "still/3", "production", POLICY)
    promote(scored.store, "still/4", "production", POLICY)
    assert kill_everywhere(run_faulty, 4, 3, do="rollback") >= 5


@pytest.mark.slow
def test_killed_in_the_first_promotion(run_faulty: Callable[..., Answers], scored: Still) -> None:
    """It also creates the anchor."""
    assert kill_everywhere(run_faulty, None, 4, do="promote", to=4) >= 14


@pytest.mark.slow
def test_killed_in_the_last_rollback(run_faulty: Callable[..., Answers], scored: Still) -> None:
    """It deletes the alias."""
    promote(scored.store, "still/4", "production", POLICY)
    assert kill_everywhere(run_faulty, 4, None, do="rollback") >= 5


def check_all(answers: Answers, ledger: Ledger) -> None:
    """Each promotion is in the chain, or was refused with a clear message."""
    assert ledger.problems() == []
    assert [entry.sequence for entry in ledger.entries] == list(range(1, len(ledger.entries) + 1))
    written = [digest for answer in answers for digest in answer["hashes"]]
    assert sorted(written) == sorted(entry.hash for entry in ledger.entries)
    assert {answer["status"] for answer in answers} == {0}
    for answer in answers:
        assert answer["code"] == 0 or (
            answer["code"] == 1 and "at the same moment; nothing was moved" in answer["message"]
        )
    assert ledger.aliases["production"] == ledger.entries[-1].to_version


@pytest.mark.slow
def test_many_at_once_on_one_machine(run_faulty: Callable[..., Answers], scored: Still) -> None:
    """The lock of the machine orders them."""
    answers = run_faulty(do="promote", turns=2, **{"at once": 4})
    check_all(answers, log.read_ledger(scored.store, "still"))
    assert {answer["code"] for answer in answers} == {0}


def test_many_at_once_on_several_machines(run_faulty: Callable[..., Answers], scored: Still, tmp_path: Path) -> None:
    """Each has its own state folder, and so its own lock: the anchor orders them."""
    answers = run_faulty(do="promote", turns=1, home=f"{tmp_path}/machine-", **{"at once": 4})
    check_all(answers, log.read_ledger(scored.store, "still"))


def test_a_full_disk(run_faulty: Callable[..., Answers], scored: Still) -> None:
    """The database gets no further page: the error says so, and ledger and alias still agree."""
    promote(scored.store, "still/3", "production", POLICY)
    before = log.read_ledger(scored.store, "still").entries
    database, backup = home() / "mlflow.db", home() / "backup.db"
    shutil.copy(database, backup)
    refused = 0
    for step in (2, 5):
        shutil.copy(backup, database)
        (answer,) = run_faulty(do="promote", to=4, full=step)
        assert (answer["status"], answer["problems"]) == (0, [])
        assert answer["at"] in (3, 4)
        if answer["code"]:
            refused += 1
            assert (answer["code"], "no space left on the disk" in answer["message"]) == (2, True)
        (after,) = run_faulty(do="promote", to=5)
        assert (after["code"], after["problems"]) == (1, [])
        assert [digest for digest, _ in after["entries"][:1]] == [entry.hash for entry in before]
        assert after["at"] == after["entries"][-1][1]
    assert refused


# --- through a server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    """A real `mlflow server` on loopback, with a SQLite database."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(empty_database, folder / "mlflow.db")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = Server(folder, port)
    server.start()
    yield server
    server.process.kill()
    server.process.wait(30)


class Server:
    """An `mlflow server` that can be killed and restarted."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.uri = folder, port, f"http://127.0.0.1:{port}"

    def start(self) -> None:
        """Start the server; returns when it answers."""
        command = [
            *(sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--log-level", "critical", "mlflow.server.fastapi_app:app"),
        ]
        settings = {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{self.folder}/mlflow.db",
            "_MLFLOW_SERVER_REGISTRY_STORE": f"sqlite:///{self.folder}/mlflow.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(self.folder / "files"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment | settings, stdout=log, stderr=log
            )
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=1).ok
        except requests.RequestException:
            return False


@pytest.fixture
def remote(served: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: Path) -> Store:
    """The store on the server with a new model `still`."""
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", served.uri)
    store = Store()
    still = make_still(store, lambda content, onnx=False: make_artifact(tmp_path, content, onnx), documents)
    for precision in ("fp32", "int8-weight"):
        still.score(still.variants[precision])
    return store


@pytest.mark.slow
def test_twenty_at_once_through_a_server(
    run_faulty: Callable[..., Answers], served: Server, remote: Store, tmp_path: Path
) -> None:
    answers = run_faulty(do="promote", turns=1, uri=served.uri, home=f"{tmp_path}/machine-", **{"at once": 20})
    check_all(answers, log.read_ledger(remote, "still"))
    rollback(remote, "still", "production")


@pytest.mark.slow
def test_twenty_at_once_on_one_database(run_faulty: Callable[..., Answers], scored: Still, tmp_path: Path) -> None:
    for folder in (str(home()), f"{tmp_path}/machine-"):
        answers = run_faulty(do="promote", turns=1, home=folder, **{"at once": 20})
        ledger = log.read_ledger(scored.store, "still")
        assert ledger.problems() == []
        entered = {entry.hash for entry in ledger.entries}
        assert all(set(answer["hashes"]) <= entered for answer in answers)
        assert all(answer["code"] in (0, 1) for answer in answers)


@pytest.mark.slow
def test_a_server_that_dies_and_returns(run_faulty: Callable[..., Answers], served: Server, remote: Store) -> None:
    """Killed before each call of a promotion that changes something."""
    promote(remote, "still/3", "production", POLICY)
    for step in range(1, 20):
        before = log.read_ledger(remote, "still")
        to = 7 - before.aliases["production"]  # 3 and 4 in turn
        (answer,) = run_faulty(do="promote", to=to, die=step, kill=served.process.pid, uri=served.uri)
        if answer["code"] == 0:
            assert served.process.poll() is None
            break
        assert (answer["code"], "does not answer" in answer["message"]) == (2, True)
        served.process.wait(30)
        served.start()
        seen = log.read_ledger(remote, "still")
        assert (seen.problems(), seen.entries[: len(before.entries)]) == ([], before.entries)
        assert seen.aliases["production"] in (3, 4)
        promote(remote, f"still/{to}", "production", POLICY)  # the same command again
        after = log.read_ledger(remote, "still")
        assert (after.problems(), after.aliases["production"], len(after.entries)) == ([], to, len(before.entries) + 1)
    assert step >= 6
