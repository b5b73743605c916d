"""A conversion is stored once, whole, under the digest of what it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.registry.checkpoints.conversions import converted_checkpoint, require_disk
from limbeck.registry.core.digest import folder_digest, read_manifest
from limbeck.registry.core.errors import BadInput


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "model.bin"
    file.write_text("source")
    return file


def write(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def test_the_key_is_the_digest_of_the_source(source: Path, limbeck_home: Path, tmp_path: Path) -> None:
    first = converted_checkpoint("test", {"a": source}, write, "model")
    assert first.path.parent == limbeck_home / "checkpoints"
    assert first.digest == folder_digest(first.path) == read_manifest(first.path)["digest"]

    def fail(folder: Path) -> None:
        raise AssertionError("converted again")

    copy = tmp_path / "copy.bin"
    copy.write_text("source")
    assert converted_checkpoint("test", {"a": copy}, fail, "model") == first
    source.write_text("changed")
    assert converted_checkpoint("test", {"a": source}, write, "model").path != first.path
    assert converted_checkpoint("other", {"a": copy}, write, "model").path != first.path


def test_a_conversion_that_was_changed_is_made_again(source: Path, limbeck_home: Path) -> None:
    first = converted_checkpoint("test", {"a": source}, write, "model")
    (first.path / "config.json").write_text("damaged")
    assert converted_checkpoint("test", {"a": source}, write, "model") == first
    assert (first.path / "config.json").read_text() == "{}"


def test_a_conversion_that_fails_leaves_nothing(source: Path, limbeck_home: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise BadInput("no")

    with pytest.raises(BadInput):
        converted_checkpoint("test", {"a": source}, fail, "model")
    assert list((limbeck_home / "checkpoints").iterdir()) == []


def test_a_full_disk(tmp_path: Path) -> None:
    require_disk(tmp_path, 1, "model")
    with pytest.raises(BadInput, match=r"model becomes 1,000,000,000\.0 GB in float32, .* free\n.*LIMBECK_HOME"):
        require_disk(tmp_path, 10**18, "model")
