"""What `deploy` and `serve` check an SBOM against: the files, the artifact it is of, and the trusted keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.export.bundle import layout
from limbeck.export.bundle.vendor import pinned_requirements
from limbeck.export.bundle.write import write_bundle
from limbeck.export.commands.locate import find_onnx_artifact
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.server.watch import Artifact, FolderWatcher, WatchProblem
from limbeck.registry.core import signing
from limbeck.registry.core.digest import (
    MANIFEST,
    artifact_digest,
    extra_manifest_fields,
    read_manifest,
    write_json,
    write_manifest,
)
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.mlflow.store import Store
from limbeck.registry.provenance import attestation, sbom
from limbeck.registry.records import NewVersion
from tests.conftest import Result
from tests.export.export_helpers import Exported


@pytest.fixture
def trusted_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a signing key. Returns the file of trusted keys, which names its owner ada."""
    public = signing.create_key(tmp_path / "ada.pem")
    (tmp_path / "trusted").write_text(f"{public} ada\n")
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "ada.pem"))
    monkeypatch.setenv(signing.TRUSTED_KEYS_VARIABLE, str(tmp_path / "trusted"))
    return tmp_path / "trusted"


@pytest.fixture
def store_with_sboms(store: Store, llama: Exported, trusted_keys: Path) -> Store:
    """coder/1 in fp32 and coder/2 in int8, both with a signed SBOM."""
    for folder in (llama.fp32, llama.int8):
        version = store.register(NewVersion(name="coder", kind="onnx", engine="onnxruntime"), folder)
        attestation.attest(store, version)
    return store


@pytest.fixture
def bundle(store_with_sboms: Store, limbeck: Callable[..., Result], tmp_path: Path) -> Path:
    done = limbeck("deploy", "coder/1", "--output", tmp_path / "bundle", "--no-hashes")
    assert "signed by ada" in done.out, done.err
    return tmp_path / "bundle"


def rewrite_manifests(bundle: Path) -> None:
    """Make the manifests match the files, as an attacker would after changing some."""
    write_manifest(bundle / layout.MODEL_FOLDER, **extra_manifest_fields(read_manifest(bundle / layout.MODEL_FOLDER)))
    files = layout.bundle_file_digests(bundle)
    write_json(bundle / MANIFEST, read_manifest(bundle) | {"digest": artifact_digest(files), "files": files})


def test_a_signed_bundle_is_served(bundle: Path, store_with_sboms: Store) -> None:
    found = find_onnx_artifact(str(bundle))
    assert found.signed_by == "ada"
    assert found.sbom == attestation.sbom_of_ref(store_with_sboms, "coder/1")
    assert (
        Runtime.load(found.path, threads=1, expected_digest=found.digest).digest
        == store_with_sboms.get("coder/1").digest
    )
    pins = (bundle / "requirements.txt").read_text().splitlines()
    assert any(pin.startswith("cryptography==") for pin in pins)
    assert not any(pin.startswith("cryptography==") for pin in pinned_requirements())  # only if something is signed


def test_changed_weights_with_matching_manifests_are_found(bundle: Path) -> None:
    weights = bundle / "model/model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    rewrite_manifests(bundle)
    with pytest.raises(DamagedArtifact, match="SBOM is of other files"):
        find_onnx_artifact(str(bundle))


def test_a_changed_file_is_found_at_load(bundle: Path) -> None:
    found = find_onnx_artifact(str(bundle))
    (bundle / "model/config.json").write_text("{}")
    with pytest.raises(DamagedArtifact, match=r"config\.json has sha256"):
        Runtime.load(found.path, threads=1, expected_digest=found.digest)


def test_a_changed_sbom_is_found(bundle: Path) -> None:
    text = (bundle / sbom.SBOM_FILE).read_text()
    (bundle / sbom.SBOM_FILE).write_text(text.replace("coder", "other", 1))
    with pytest.raises(DamagedArtifact, match=r"sbom\.json has sha256"):
        find_onnx_artifact(str(bundle))
    rewrite_manifests(bundle)
    with pytest.raises(DamagedArtifact, match="the signature of ada does not match"):
        find_onnx_artifact(str(bundle))


def test_the_sbom_of_another_version_is_found(bundle: Path, store_with_sboms: Store) -> None:
    other = attestation.sbom_of_ref(store_with_sboms, "coder/2")
    assert other is not None
    sbom.write_sbom(bundle, other)
    rewrite_manifests(bundle)
    with pytest.raises(DamagedArtifact, match="is of other files"):
        find_onnx_artifact(str(bundle))


def test_a_missing_sbom_or_signature_is_refused(bundle: Path) -> None:
    (bundle / sbom.SIGNATURES_FILE).unlink()
    rewrite_manifests(bundle)
    with pytest.raises(BadInput, match="is not signed"):
        find_onnx_artifact(str(bundle))
    (bundle / sbom.SBOM_FILE).unlink()
    rewrite_manifests(bundle)
    with pytest.raises(BadInput, match="has no SBOM"):
        find_onnx_artifact(str(bundle))


def test_an_sbom_signed_with_an_untrusted_key_is_refused(
    bundle: Path, trusted_keys: Path, tmp_path: Path, limbeck: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted_keys.write_text(f"{signing.create_key(tmp_path / 'ben.pem')} ben\n")
    untrusted = "not with a key that LIMBECK_TRUSTED_KEYS lists"
    for command in (("serve", bundle, "--port", 0), ("deploy", "coder/1", "--output", "b")):
        done = limbeck(*command)
        assert (done.code, untrusted in done.err) == (2, True), done.err
    with pytest.raises(BadInput, match=untrusted):  # what `serve` asks its child process for a registered version
        find_onnx_artifact("coder/1")
    assert not Path("b").exists()
    trusted_keys.unlink()
    gone = limbeck("serve", bundle, "--port", 0)
    assert (gone.code, "trusted, which cannot be read" in gone.err) == (2, True)
    monkeypatch.delenv(signing.TRUSTED_KEYS_VARIABLE)
    assert find_onnx_artifact(str(bundle)).signed_by is None


def test_a_folder_without_an_sbom_is_refused_if_keys_are_trusted(
    llama: Exported, trusted_keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="has no SBOM"):
        find_onnx_artifact(str(llama.fp32))
    monkeypatch.delenv(signing.TRUSTED_KEYS_VARIABLE)
    assert find_onnx_artifact(str(llama.fp32)).sbom is None


def test_an_unsigned_bundle_does_not_replace_a_served_one(bundle: Path, llama: Exported, tmp_path: Path) -> None:
    found = find_onnx_artifact(str(bundle))
    watcher = FolderWatcher(Artifact(found.path, found.name, found.digest), 1.0)
    assert isinstance(watcher._read_artifact(), Artifact)
    shutil.rmtree(bundle)
    write_bundle(llama.int8, bundle)  # without a signed SBOM
    refused = watcher._read_artifact()
    assert isinstance(refused, WatchProblem)
    assert "has no SBOM" in refused.message


def test_deploy_reports_the_sbom_and_its_signer(
    store_with_sboms: Store, limbeck: Callable[..., Result], tmp_path: Path
) -> None:
    done = limbeck("deploy", "coder/2", "--output", tmp_path / "b", "--no-hashes", "--format", "json")
    expected = attestation.sbom_of_ref(store_with_sboms, "coder/2")
    assert expected is not None
    output = json.loads(done.out)
    assert (output["sbom"], output["signed_by"]) == (expected.digest, "ada")
