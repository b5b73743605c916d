"""Bundles: a verified artifact with everything that serves it, in a folder that needs no installed Limbeck."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from limbeck.export.bundle.layout import is_bundle, verified_artifact_folder
from limbeck.export.bundle.write import write_bundle
from limbeck.export.commands.locate import find_artifact
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from tests.export.export_helpers import Exported


def test_the_artifact_in_a_bundle_is_the_deployed_one(llama: Exported, shared_bundle: Path, runtime: Runtime) -> None:
    assert is_bundle(shared_bundle)
    assert not is_bundle(llama.fp32)
    found = find_artifact(str(shared_bundle))
    assert (found.name, found.engine, found.path) == ("coder/3", "onnxruntime", shared_bundle / "model")
    assert resolve_model(str(shared_bundle)).digest == llama.variants[0].digest  # commands of other rooms use this
    bundled = Runtime.load(found.path, expected_digest=llama.variants[0].digest)
    ours, theirs = (r.generate(["def "], max_new_tokens=8)[0].token_ids for r in (bundled, runtime))
    assert ours == theirs
    manifest = read_manifest(found.path)
    assert manifest["model"] == "coder/3"
    assert manifest["parity"] == read_manifest(llama.fp32)["parity"]
    assert llama.variants[0].digest in (shared_bundle / "README.md").read_text()


def test_a_new_bundle_replaces_an_old_one(llama: Exported, bundle: Path) -> None:
    digest = write_bundle(llama.int8, bundle)
    assert Runtime.load(verified_artifact_folder(bundle)).digest == digest == llama.variants[1].digest
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_changed_model_card_is_found(llama: Exported, bundle: Path) -> None:
    digest = write_bundle(llama.fp32, bundle, model_card="---\nlicense: mit\n---\n\n# à\n")
    assert Runtime.load(verified_artifact_folder(bundle)).digest == digest == llama.variants[0].digest
    card = bundle / "model" / "README.md"
    assert card.read_text(encoding="utf-8").endswith("# à\n")
    card.write_text("# another\n")
    with pytest.raises(DamagedArtifact, match=r"model/README\.md has sha256"):
        verified_artifact_folder(bundle)


def test_an_old_bundle_stays_if_the_new_one_fails(llama: Exported, bundle: Path) -> None:
    before = (bundle / "limbeck.json").read_bytes()
    artifact = shutil.copytree(llama.int8, bundle.parent / "artifact")
    with open(artifact / "config.json", "a") as file:
        file.write(" ")
    with pytest.raises(DamagedArtifact, match=r"config\.json has sha256"):
        write_bundle(artifact, bundle)
    with pytest.raises(DamagedArtifact, match="expected 0000"):
        write_bundle(llama.int8, bundle, digest="0" * 64)
    assert (bundle / "limbeck.json").read_bytes() == before
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["artifact", "bundle"]


def test_other_models_and_folders_with_other_files_are_refused(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not an ONNX artifact"):
        write_bundle(llama.torch, tmp_path / "bundle")
    (tmp_path / "home.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not a bundle"):
        write_bundle(llama.fp32, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["home.txt"]


def test_the_unit_and_the_container_name_only_existing_files(shared_bundle: Path) -> None:
    unit = (shared_bundle / "limbeck.service").read_text()
    assert "Description=coder/3, served by Limbeck" in unit
    assert "/bin/kill -HUP $MAINPID" in unit
    container = (shared_bundle / "Containerfile").read_text()
    for name in re.findall(r'"\./(\w+)"|COPY (\w\S*)', container) + re.findall(r"bundle/()(\w+)", unit):
        assert (shared_bundle / "".join(name)).is_file(), name
    python = json.loads((shared_bundle / "limbeck.json").read_text())["python"]
    assert f"python:{python}-slim" in container
    for program in ("start", "health"):
        assert (shared_bundle / program).stat().st_mode & 0o111 == 0o111
