"""Bundles: verified copies that need no registry."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from export_helpers import Exported

from export.bundle import deploy, is_bundle
from export.runtime import Runtime
from registry.digest import read_manifest
from registry.errors import BadInput, DamagedArtifact


def test_a_bundle_runs_as_its_artifact_does(llama: Exported, runtime: Runtime, tmp_path: Path) -> None:
    digest = deploy(llama.fp32, tmp_path / "bundle", about={"model": "coder/3"})
    assert is_bundle(tmp_path / "bundle")
    assert not is_bundle(llama.fp32)
    bundled = Runtime.load(tmp_path / "bundle", expected=digest)
    ours, theirs = (r.generate(["def "], max_new_tokens=8)[0].token_ids for r in (bundled, runtime))
    assert ours == theirs
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest["model"] == "coder/3"
    assert manifest["parity"] == read_manifest(llama.fp32)["parity"]
    assert digest in (tmp_path / "bundle/README.md").read_text()


def test_a_newer_bundle_takes_the_place_of_an_older_one(llama: Exported, tmp_path: Path) -> None:
    deploy(llama.fp32, tmp_path / "bundle")
    digest = deploy(llama.int8, tmp_path / "bundle")
    assert Runtime.load(tmp_path / "bundle").digest == digest == llama.variants[1].digest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_changed_artifact_is_not_deployed(llama: Exported, tmp_path: Path) -> None:
    artifact = shutil.copytree(llama.fp32, tmp_path / "artifact")
    with open(artifact / "config.json", "a") as file:
        file.write(" ")
    with pytest.raises(DamagedArtifact, match=r"config\.json has sha256"):
        deploy(artifact, tmp_path / "bundle")
    with pytest.raises(DamagedArtifact, match="expected 0000"):
        deploy(llama.fp32, tmp_path / "bundle", digest="0" * 64)
    assert not (tmp_path / "bundle").exists()


def test_only_an_onnx_artifact_goes_only_where_nothing_else_is(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no ONNX artifact"):
        deploy(llama.torch, tmp_path / "bundle")
    (tmp_path / "home.txt").write_text("mine")
    with pytest.raises(BadInput, match="no bundle"):
        deploy(llama.fp32, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["home.txt"]
