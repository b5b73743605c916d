"""The state folder, files that are written completely or not at all, and locks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from limbeck.registry.core.home import atomic_write, home, machine_lock, tracking_uri


def write_half(file: Path) -> None:
    with atomic_write(file) as part:
        part.write_text("half of tw")
        raise KeyboardInterrupt


def test_a_file_or_folder_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    file, folder = tmp_path / "below" / "file", tmp_path / "folder"
    with atomic_write(file) as part:
        part.write_text("one")
        assert not file.exists()
    with pytest.raises(KeyboardInterrupt):
        write_half(file)
    assert file.read_text() == "one"
    for content in ("one", "two"):
        with atomic_write(folder) as part:
            part.mkdir()
            (part / content).touch()
        assert os.listdir(folder) == [content]
    with pytest.raises(FileNotFoundError), atomic_write(folder) as part:
        shutil.copytree(tmp_path / "absent", part)
    assert os.listdir(folder) == ["two"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["below", "file", "folder", "two"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "folder") as part:
            part.mkdir()
            for name, mode in (("weights.safetensors", 0o600), ("start.sh", 0o755)):
                (part / name).write_text("")
                (part / name).chmod(mode)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "folder").iterdir()}
    assert modes == {"weights.safetensors": 0o640, "start.sh": 0o755}


def test_the_environment_decides_where_the_state_is(limbeck_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (home(), tracking_uri()) == (limbeck_home, f"sqlite:///{limbeck_home}/mlflow.db")
    monkeypatch.delenv("LIMBECK_HOME")
    assert home() == Path.cwd() / ".limbeck"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org")
    assert tracking_uri() == "http://example.org"


def test_the_name_of_a_lock_may_hold_any_character(limbeck_home: Path) -> None:
    with machine_lock("register-a/b \u0436"):
        assert [file.name for file in (limbeck_home / "locks").iterdir()] == ["register-a_b__.lock"]
