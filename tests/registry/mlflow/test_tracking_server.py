"""A tracking server: one that does not answer, and a real one on loopback, also through a connection that fails."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from click.testing import CliRunner
from mlflow.cli import cli as mlflow_command

from limbeck.registry.catalog.copy_version import copy_version
from limbeck.registry.core.digest import folder_digest
from limbeck.registry.core.errors import DamagedArtifact, Unreachable
from limbeck.registry.core.home import home
from limbeck.registry.doctor.housekeeping import faults
from limbeck.registry.gate.promotion import promote, rollback
from limbeck.registry.ledger import log as ledger
from limbeck.registry.mlflow import client, layout, transfer
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, Scorecard
from tests import ROOT
from tests.conftest import Result
from tests.flaky_proxy import FlakyProxy, flaky_proxy
from tests.registry.conftest import POLICY, Still


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.timeout(30)  # MLflow alone would try for minutes
def test_a_server_that_does_not_answer(limbeck_home: Path, silent_port: int) -> None:
    with pytest.raises(Unreachable, match=r"no answer within 4 s\n.*MLFLOW_TRACKING_URI"):
        Store(f"http://127.0.0.1:{silent_port}")
    with pytest.raises(Unreachable, match="connection refused"):
        Store(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unreachable, match="does not answer"):
        Store("http://nowhere.invalid")


def test_every_command_reports_that_the_server_does_not_answer(
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
    """The address of a server and the folder of its artifacts."""

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
    """Replaces the fixture of the same name: the store on the server, with an empty state folder here."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    return Store()


def test_the_whole_gate_through_a_server(
    server: Server, store: Store, scored: Still, limbeck: Callable[..., Result]
) -> None:
    assert store.is_server
    int8 = scored.variants["int8-weight"]
    assert store.get(int8.ref) == int8
    assert not store.artifacts.is_local(int8)
    folder = store.artifacts.verified_folder(int8)
    assert folder.is_relative_to(home() / "artifacts-cache")
    assert folder_digest(folder) == int8.digest
    (folder / "model.onnx").write_text("damaged here")
    assert folder_digest(store.artifacts.verified_folder(int8)) == int8.digest  # fetched again

    promote(store, "still/3", "production", POLICY)
    promote(store, "still", "production", POLICY)
    assert store.get("still@production").ref == int8.ref
    rollback(store, "still", "production")
    store.client.set_registered_model_alias("still", "production", "5")
    assert limbeck("models", "history", "still", "--verify").code == 1
    ledger.adopt_alias(store, "still", "production", who="me", reason="")
    assert ledger.read_ledger(store, "still").problems() == []

    shutil.rmtree(home())  # another machine
    found = {each.version.ref: each for each in Store().versions_with_findings("still")}  # fetched
    assert found[int8.ref].scorecards == Store().findings.scorecards(int8) == scored.store.findings.scorecards(int8)
    assert found[int8.ref].version == store.get(int8.ref)
    listed = limbeck("models", "list", "still")
    assert (listed.code, listed.out.count("still/")) == (0, 5 + 4)
    doctor = limbeck("doctor", "--deep")
    assert (doctor.code, "their digests verified" in doctor.out) == (0, True)

    for file in server.files.rglob("model.onnx"):
        file.write_text("damaged there")
    shutil.rmtree(home() / "artifacts-cache")
    with pytest.raises(DamagedArtifact):
        store.artifacts.verified_folder(int8)
    assert not (home() / "artifacts-cache" / int8.digest).exists()


def test_a_version_is_copied_to_a_server_and_survives_a_purge_there(
    server: Server,
    store: Store,
    empty_database: Path,
    files: Path,
    documents: Path,
    make_card: Callable[..., Scorecard],
    tmp_path: Path,
) -> None:
    (tmp_path / "staging").mkdir()
    database = shutil.copy(empty_database, tmp_path / "staging")
    staging = Store(f"sqlite:///{database}")
    teacher = staging.register(NewVersion(name="copied", kind="teacher"), files)
    for usd in (1.0, 2.0):
        staging.findings.add_scorecard(teacher, make_card(teacher.digest, usd=usd), documents)
    ledger.adopt_alias(staging, "copied", "production", who="me", reason="")
    copied = copy_version(staging, "copied/1", store)
    assert [(each.copy, each.scorecards) for each in copied] == [("copied/1", 2)]
    copy = store.get("copied/1")
    assert folder_digest(store.artifacts.verified_folder(copy)) == teacher.digest
    assert store.findings.scorecards(copy) == staging.findings.scorecards(teacher)

    digest, run_id = next(iter(store.findings.scorecard_runs(copy, store.tags([copy])[copy.ref]).items()))
    store.client.delete_run(run_id)
    backend = ("--backend-store-uri", f"sqlite:///{server.files.parent}/mlflow.db")
    purge = ("gc", *backend, "--artifacts-destination", str(server.files), "--tracking-uri", server.uri)
    assert CliRunner().invoke(mlflow_command, purge).exit_code == 0
    shutil.rmtree(home() / "scorecards")  # another machine
    cards, missing = Store().findings.scorecards_and_missing(copy)
    assert (len(cards), len(missing), digest[:12] in missing[0]) == (1, 1, True)
    (fault,) = [each for each in faults(Store()) if each.subject == "copied/1" and each.mend]
    assert fault.check(repair=True).state == "note"
    assert len(copy_version(staging, "copied/1", store)) == 1  # brings it back
    assert len(Store().findings.scorecards(copy)) == 2


@pytest.fixture
def proxy(server: Server, limbeck_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    """A proxy to the server that fails on command; clients retry for one second only."""
    monkeypatch.setattr(client, "RETRY_SECONDS", 1.0)
    with flaky_proxy(server.uri) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
        yield proxy


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An artifact of five files."""
    folder = tmp_path / "artifact"
    (folder / "more").mkdir(parents=True)
    for place in range(4):
        (folder / f"part-{place}.safetensors").write_bytes(f"{tmp_path}{place}".encode() * 1000)
    (folder / "more" / "config.json").write_text("{}")
    return folder


def test_an_upload_resumes_after_the_server_died(
    server: Server, proxy: FlakyProxy, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.cut_after = 3
    with pytest.raises(Unreachable):
        Store().register(NewVersion(name="upload", kind="student"), files)
    assert "trying again for 1 s" in capsys.readouterr().err
    proxy.cut_after = None
    assert Store().versions("upload") == []  # an incomplete version is not listed
    assert len(proxy.puts) == 3
    # One of them was stored with its size, but changed.
    # The server also has the files of other tests, by the same names.
    stored = max(server.files.rglob(proxy.puts[-1]), key=lambda path: path.stat().st_mtime_ns)
    stored.write_bytes(b"x" * stored.stat().st_size)
    version = Store().register(NewVersion(name="upload", kind="student"), files)
    assert "upload fp32: 3 of 5 files are there already\n" in capsys.readouterr().err
    assert sorted(proxy.puts[3:5]) == sorted({p.name for p in files.rglob("*.*")} - set(proxy.puts[:3]))
    assert len(proxy.puts) == 5 + 5  # all of them again, since one had changed
    assert folder_digest(Store().artifacts.verified_folder(version)) == version.digest == folder_digest(files)


def test_an_upload_resumes_after_its_process_was_killed(proxy: FlakyProxy, files: Path) -> None:
    begin = (
        "from pathlib import Path; from limbeck.registry.mlflow.store import Store; "
        "from limbeck.registry.records import NewVersion; "
        f"Store().register(NewVersion(name='killed', kind='student'), Path({str(files)!r}))"
    )
    proxy.cut_after = 2
    process = subprocess.Popen([sys.executable, "-c", begin], cwd=ROOT)
    assert proxy.reached.wait(60)
    process.kill()
    process.wait()
    proxy.cut_after = None
    first = list(proxy.puts)
    assert Store().versions("killed") == []
    version = Store().register(NewVersion(name="killed", kind="student"), files)
    assert sorted(proxy.puts) == sorted(p.name for p in files.rglob("*.*"))  # each is uploaded once
    assert proxy.puts[:2] == first
    assert folder_digest(Store().artifacts.verified_folder(version)) == version.digest


@pytest.mark.slow
def test_doctor_deletes_abandoned_uploads(
    server: Server, proxy: FlakyProxy, files: Path, limbeck: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = Store().register(NewVersion(name="kept", kind="student"), files)
    proxy.cut_after = len(proxy.puts) + 2
    with pytest.raises(Unreachable):
        Store().register(NewVersion(name="given-up", kind="student"), files)
    proxy.cut_after = None
    assert "given-up" not in limbeck("doctor").out  # another machine may resume it
    monkeypatch.setattr(transfer, "ABANDONED_AFTER", timedelta(0))
    assert "upload of given-up" in limbeck("doctor").out
    before = len(list(server.files.rglob("part-0.safetensors")))
    assert "deleted" in limbeck("doctor", "--clean").out
    assert len(list(server.files.rglob("part-0.safetensors"))) == before - 1
    assert "given-up" not in limbeck("doctor").out
    shutil.rmtree(home() / "artifacts-cache")
    assert folder_digest(Store().artifacts.verified_folder(finished)) == finished.digest


def test_a_lost_answer_makes_no_second_version(proxy: FlakyProxy, files: Path) -> None:
    proxy.lost = {"/model-versions/create"}
    version = Store().register(NewVersion(name="lost", kind="student"), files)
    assert proxy.lost == set()
    assert [each.version for each in Store().versions("lost")] == [version.version] == [1]


def test_a_busy_server_is_retried(
    proxy: FlakyProxy, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RETRY_SECONDS", 20.0)
    store = Store()
    for status in (429, 503):
        proxy.answers = [status]
        store.model_names()
        assert f"it answers {status}; trying again for 20 s" in capsys.readouterr().err
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.3)
    proxy.answers = [503] * 20
    with pytest.raises(Unreachable, match="it answers 503"):
        store.model_names()


def test_a_password_in_the_address_is_never_printed(
    proxy: FlakyProxy, limbeck: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = proxy.uri.replace("://", "://ann:a-secret@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    results = []
    for command in (["doctor", "--format", "json"], ["doctor"], ["models", "show", "nothing/1"]):
        results.append(limbeck(*command))
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret.rpartition(":")[0] + f":{free_port()}")
    results += [limbeck("doctor", "--format", "json"), limbeck("models", "list")]
    for result in results:
        assert "a-secret" not in result.out + result.err
    assert results[-1].code == 2
    assert "***@" in results[-1].err


def test_versions_of_another_layout_are_refused(
    server: Server, store: Store, files: Path, limbeck: Callable[..., Result]
) -> None:
    store.register(NewVersion(name="layout", kind="student"), files)
    experiment = store.client.get_experiment_by_name(layout.EXPERIMENT).experiment_id
    try:
        store.client.set_experiment_tag(experiment, layout.LAYOUT_TAG, "0")
        result = limbeck("models", "list")
        assert (result.code, result.out) == (2, "")
        line = f"the tracking server {server.uri} was written under layout 0 of Limbeck: move it away"
        assert result.err == f"error: {line}, or set MLFLOW_TRACKING_URI to another, and run again\n"
    finally:
        store.client.set_experiment_tag(experiment, layout.LAYOUT_TAG, layout.LAYOUT)
    assert Store().versions("layout")
