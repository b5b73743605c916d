"""What a bundle holds, and that a changed, missing or extra file is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from limbeck.export.bundle.write import write_bundle
from limbeck.export.commands.locate import find_artifact
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import DamagedArtifact
from tests.export.export_helpers import Exported


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("start", "start has sha256"),
        ("lib/limbeck/export/server/app.py", "lib/limbeck/export/server/app.py has sha256"),
        ("requirements.txt", "requirements.txt has sha256"),
        ("model/limbeck.json", "model/limbeck.json has sha256"),
        ("lib/limbeck/export/new.py", "lib/limbeck/export/new.py was added"),
        ("limbeck.json", "limbeck.json was changed after it was written"),
    ],
)
def test_a_changed_file_is_found(bundle: Path, name: str, message: str) -> None:
    with open(bundle / name, "a") as file:
        file.write("\n")
    with pytest.raises(DamagedArtifact, match=re.escape(message)):
        find_artifact(str(bundle))


def test_a_missing_file_is_found(bundle: Path) -> None:
    (bundle / "model/limbeck.json").unlink()
    (bundle / "health").unlink()
    with pytest.raises(DamagedArtifact, match=r"health is missing; model/limbeck.json is missing"):
        find_artifact(str(bundle))


def test_a_changed_weight_is_found_when_it_is_loaded(bundle: Path) -> None:
    (bundle / "lib/__pycache__").mkdir()
    (bundle / "lib/__pycache__/limbeck.pyc").write_bytes(b"")  # ignored
    weights = bundle / "model/model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedArtifact, match=r"model\.onnx has sha256"):
        Runtime.load(find_artifact(str(bundle)).path)


def test_every_file_is_listed_and_a_second_bundle_is_identical(
    shared_bundle: Path, tmp_path: Path, llama: Exported
) -> None:
    inner = {f"model/{name}" for name in read_manifest(shared_bundle / "model")["files"]}
    listed = inner | set(read_manifest(shared_bundle)["files"]) | {"limbeck.json"}
    assert listed == {path.relative_to(shared_bundle).as_posix() for path in shared_bundle.rglob("*") if path.is_file()}
    write_bundle(llama.fp32, tmp_path / "again", manifest_fields={"model": "coder/3"})
    assert (tmp_path / "again/limbeck.json").read_bytes() == (shared_bundle / "limbeck.json").read_bytes()
