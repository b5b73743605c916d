"""Digests and manifests of folders, and files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.core.digest import (
    MANIFEST,
    folder_digest,
    json_digest,
    read_manifest,
    verify_files,
    write_manifest,
)
from limbeck.registry.core.errors import DamagedArtifact
from limbeck.registry.core.home import atomic_write, home, tracking_uri


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "below" / "a").write_bytes(b"one")
    lines = [
        f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in (("b", b"two"), ("below/a", b"one"))
    ]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert folder_digest(tmp_path) == digest
    (tmp_path / "README.md").write_text("a card is no part of it")
    assert write_manifest(tmp_path, name="still") == digest == folder_digest(tmp_path) == verify_files(tmp_path, digest)
    manifest = read_manifest(tmp_path)
    assert (manifest["digest"], manifest["name"], sorted(manifest["files"])) == (digest, "still", ["b", "below/a"])
    (tmp_path / "b").rename(tmp_path / "c")
    assert folder_digest(tmp_path) != digest


def test_json_in_any_order() -> None:
    assert json_digest({"a": 1, "b": [2, 3]}) == json_digest({"b": [2, 3], "a": 1}) != json_digest({"a": 1})


def test_what_is_damaged_is_named(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("a")
    (folder / "gone").write_text("x")
    write_manifest(folder)
    (folder / "gone").unlink()
    (folder / "new").write_text("x")
    (folder / "config.json").write_text("{}")
    with pytest.raises(DamagedArtifact) as damaged:
        verify_files(folder)
    for words in ("gone is missing", "new was added", "config.json has sha256 44136fa355b3, recorded "):
        assert words in damaged.value.message


@pytest.mark.parametrize("content", ["no JSON", "[1]", json.dumps("x")])
def test_a_damaged_manifest(make_folder: Callable[..., Path], content: str) -> None:
    folder = make_folder("a")
    (folder / MANIFEST).write_text(content)
    with pytest.raises(DamagedArtifact, match=r"not a JSON object|not JSON"):
        verify_files(folder)


def stopped_halfway(file: Path) -> None:
    with atomic_write(file) as part:
        part.write_text("half of tw")
        raise KeyboardInterrupt


def test_written_whole(tmp_path: Path) -> None:
    file, folder = tmp_path / "below" / "file", tmp_path / "folder"
    with atomic_write(file) as part:
        part.write_text("one")
        assert not file.exists()
    with pytest.raises(KeyboardInterrupt):
        stopped_halfway(file)
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


def test_where_the_state_is(limbeck_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (home(), tracking_uri()) == (limbeck_home, f"sqlite:///{limbeck_home}/mlflow.db")
    monkeypatch.delenv("LIMBECK_HOME")
    assert home() == Path.cwd() / ".limbeck"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org")
    assert tracking_uri() == "http://example.org"
