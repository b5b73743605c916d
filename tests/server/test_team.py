"""All of Limbeck on the server of a team: PostgreSQL, S3 and accounts. Clients only set its address."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.registry.core.digest import folder_digest
from limbeck.registry.core.home import home
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.conftest import Result
from tests.flaky_proxy import flaky_proxy
from tests.quickstart.test_quickstart import POLICY, RECIPE, TEACHER
from tests.server.conftest import Team

pytestmark = [pytest.mark.server, pytest.mark.timeout(280)]

Limbeck = Callable[..., Result]
APPROVALS = '[approvals]\nneeded = 1\npeople = ["carl"]\n'
LABELS = "[objectives.labels]\nlabels = 1.0\n"


def parse_output(result: Result) -> Any:
    """The JSON that a successful command printed."""
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_the_whole_loop_by_several_people(log_in: Callable[..., None], limbeck: Limbeck, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(teacher=TEACHER).replace(LABELS, ""))
    (tmp_path / "policy.toml").write_text(POLICY + APPROVALS)
    log_in("ann")
    parse_output(limbeck("distill", "recipe.toml", "--format", "json"))
    assert limbeck("export", "tiny-coder/2", "--precision", "fp32").code == 0
    heldout = home() / "data" / "tiny-coder" / "heldout.jsonl"
    tasks = tmp_path / "tasks"
    assert limbeck("tasks", "make", heldout, "--name", "stdlib", "--output", tasks, "--kind", "bits_per_byte").code == 0
    score = ("--tasks", "stdlib_bits_per_byte", "--include-path", tasks, "--against", "tiny-coder/1", "--limit", 12)
    done = limbeck("eval", "tiny-coder", *score)
    assert done.code == 0, done.err
    assert {version.author for version in Store().versions("tiny-coder")} == {"ann"}

    log_in("carl")  # another machine
    assert len(parse_output(limbeck("models", "list", "tiny-coder", "--format", "json"))) == 3
    assert len(parse_output(limbeck("leaderboard", "tiny-coder", "--format", "json"))) == 3
    assert parse_output(limbeck("models", "show", "tiny-coder/3", "--format", "json"))["parent"] == "tiny-coder/2"
    assert parse_output(limbeck("models", "lineage", "tiny-coder", "--format", "json"))
    assert limbeck("models", "diff", "tiny-coder/2", "tiny-coder/3").code == 0

    promote = ("promote", "tiny-coder/3", "--policy", "policy.toml")
    log_in("ann")
    refused = limbeck(*promote)
    assert (refused.code, "approvals" in refused.err) == (1, True), refused.err
    assert limbeck("request", "tiny-coder/3", "--reason", "better").code == 0
    assert limbeck("approve", "tiny-coder/3", "--policy", "policy.toml", "--yes").code != 0  # the author cannot approve
    log_in("bob")
    for command in (promote, ("request", "tiny-coder/3", "--reason", "me too"), ("approve", "tiny-coder/3", "--yes")):
        refused = limbeck(*command)
        assert refused.code in (1, 2), refused.err
        assert "Traceback" not in refused.err
    assert Store().aliases("tiny-coder") == {}
    log_in("carl")
    approved = limbeck("approve", "tiny-coder/3", "--policy", "policy.toml", "--yes")
    assert approved.code == 0, approved.err

    log_in("bob")  # may read; the server lets him move nothing
    refused = limbeck(*promote)
    assert (refused.code, "does not let bob do this" in refused.err) == (2, True), refused.err
    assert Store().aliases("tiny-coder") == {}
    log_in("ann")
    done = limbeck(*promote)
    assert done.code == 0, done.err
    assert limbeck("models", "history", "tiny-coder", "--verify").code == 0
    log_in("bob")
    entries = parse_output(limbeck("models", "history", "tiny-coder", "--format", "json"))["entries"]
    assert [(entry["action"], entry["who"]) for entry in entries] == [("promote", "ann")]
    bundle = limbeck("deploy", "tiny-coder@production", "--output", tmp_path / "bundle", "--no-hashes")
    assert bundle.code == 0, bundle.err
    assert limbeck("rollback", "tiny-coder").code == 2
    log_in("carl")  # may write the entry, but not delete an alias
    refused = limbeck("rollback", "tiny-coder")
    assert (refused.code, "does not let carl do this" in refused.err) == (2, True), refused.err
    assert Store().aliases("tiny-coder") == {"production": 3}
    assert limbeck("models", "history", "tiny-coder", "--verify").code == 0
    log_in("ann")
    done = limbeck("rollback", "tiny-coder")
    assert done.code == 0, done.err
    assert Store().aliases("tiny-coder") == {}
    doctor = limbeck("doctor", "--deep")
    assert doctor.code == 0, doctor.out + doctor.err


def test_a_wrong_and_a_missing_password(log_in: Callable[..., None], limbeck: Limbeck) -> None:
    log_in("ann", "a wrong password")
    result = limbeck("models", "list")
    assert (result.code, "does not accept the user ann with this password" in result.err) == (2, True)
    assert "a wrong password" not in result.err
    log_in(None)
    result = limbeck("models", "list")
    assert (result.code, "asks for a user and a password\n  set MLFLOW_TRACKING_USERNAME" in result.err) == (2, True)


def test_clients_upload_to_s3_directly(
    direct: Team, limbeck_home: Path, monkeypatch: pytest.MonkeyPatch, make_folder: Callable[..., Path]
) -> None:
    direct.log_in(monkeypatch, "ann")
    folder = make_folder("straight")
    version = Store().register(NewVersion(name="straight", kind="student"), folder)
    assert version.source.startswith("s3://")
    assert folder_digest(Store().artifacts.verified_folder(version)) == version.digest == folder_digest(folder)


def test_an_upload_survives_a_restart_of_the_server(
    team: Team, log_in: Callable[..., None], make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in("ann")
    folder = make_folder("patient")
    for place in range(4):
        (folder / f"part-{place}").write_bytes(bytes([place]) * 100_000)
    with flaky_proxy(team.uri) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
        proxy.cut_after = 3

        def restart() -> None:
            proxy.reached.wait(60)
            team.stop()
            team.start()
            proxy.cut_after = None

        thread = threading.Thread(target=restart)
        thread.start()
        version = Store().register(NewVersion(name="patient", kind="student"), folder)
        thread.join()
        assert sorted(proxy.puts) == sorted(p.name for p in folder.iterdir())  # each is uploaded once
        assert folder_digest(Store().artifacts.verified_folder(version)) == version.digest
