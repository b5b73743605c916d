"""A workspace that was backed up is restored whole, or not at all."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.core.home import home
from limbeck.registry.ledger import log
from limbeck.registry.mlflow.store import Store
from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]


@pytest.fixture
def backup(scored: Still, limbeck: Limbeck, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A backup of a workspace with a promoted version; the state folder is another one now, and empty."""
    assert limbeck("promote", "still/3").code == 0
    file = tmp_path / "backup.tar"
    made = limbeck("backup", file, "--format", "json")
    assert made.code == 0
    with tarfile.open(file) as tar:
        assert json.loads(made.out)["files"] == len(tar.getnames()) - 1
    home().rename(tmp_path / "away")
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "new"))
    return file


def test_a_restored_workspace_has_everything(scored: Still, backup: Path, limbeck: Limbeck) -> None:
    restored = limbeck("restore", backup)
    assert (restored.code, restored.out.startswith("5 versions")) == (0, True)
    store = Store()
    assert [version.digest for version in store.versions()] == [
        version.digest for version in (scored.teacher, scored.student, *scored.variants.values())
    ]
    assert len(store.findings.scorecards(store.get("still/3"))) == 1
    assert log.read_ledger(store, "still").problems() == []
    assert limbeck("models", "history", "still", "--verify").code == 0
    assert limbeck("doctor", "--deep").code == 0
    again = limbeck("restore", backup)
    assert (again.code, "has a workspace already" in again.err) == (2, True)
    twice = limbeck("backup", backup)
    assert (twice.code, "exists" in twice.err) == (2, True)


def test_a_damaged_backup_restores_nothing(backup: Path, limbeck: Limbeck) -> None:
    content = backup.read_bytes()
    weights = content.index(b"int4int4int4")
    changed = content[:weights] + b"X" + content[weights + 1 :]
    for damaged, line in ((changed, "model.onnx differs"), (content[:-20_000], "not a complete backup"), (b"x", "not")):
        backup.write_bytes(damaged)
        result = limbeck("restore", backup)
        assert (result.code, line in result.err) == (2, True)
        assert not any(home().iterdir())


def test_a_backup_does_not_write_outside_of_the_state_folder(limbeck_home: Path, limbeck: Limbeck) -> None:
    with tarfile.open("evil.tar", "w") as tar:
        tar.add(__file__, "../outside.py")
    assert limbeck("restore", "evil.tar").code == 2
    assert not (limbeck_home.parent / "outside.py").exists()


def test_there_is_nothing_to_back_up(limbeck_home: Path, limbeck: Limbeck, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no workspace in" in limbeck("backup", "b.tar").err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "is not a workspace on this machine" in limbeck("backup", "b.tar").err
