"""Digests and manifests of folders."""

from __future__ import annotations

import hashlib
import json
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


def test_a_digest_covers_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "below" / "a").write_bytes(b"one")
    lines = [
        f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in (("b", b"two"), ("below/a", b"one"))
    ]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert folder_digest(tmp_path) == digest
    (tmp_path / "README.md").write_text("a card does not count")
    assert write_manifest(tmp_path, name="still") == digest == folder_digest(tmp_path) == verify_files(tmp_path, digest)
    manifest = read_manifest(tmp_path)
    assert (manifest["digest"], manifest["name"], sorted(manifest["files"])) == (digest, "still", ["b", "below/a"])
    (tmp_path / "b").rename(tmp_path / "c")
    assert folder_digest(tmp_path) != digest


def test_a_json_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert json_digest({"a": 1, "b": [2, 3]}) == json_digest({"b": [2, 3], "a": 1}) != json_digest({"a": 1})


def test_damaged_files_are_named(make_folder: Callable[..., Path]) -> None:
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


@pytest.mark.parametrize("extra", [" ", "\n", "\n\n"])
def test_bytes_behind_a_manifest_are_found(make_folder: Callable[..., Path], extra: str) -> None:
    folder = make_folder("a")
    write_manifest(folder, name="caf\u00e9", loss=float("nan"), rate=1e-7)
    verify_files(folder)
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + extra)
    with pytest.raises(DamagedArtifact, match=r"limbeck\.json was changed after it was written"):
        verify_files(folder)


@pytest.mark.parametrize("content", ["no JSON", "[1]", json.dumps("x")])
def test_a_damaged_manifest(make_folder: Callable[..., Path], content: str) -> None:
    folder = make_folder("a")
    (folder / MANIFEST).write_text(content)
    with pytest.raises(DamagedArtifact, match=r"not a JSON object|not JSON"):
        verify_files(folder)
