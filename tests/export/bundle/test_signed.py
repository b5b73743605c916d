"""What `deploy` and `serve` hold an SBOM against: the files, the artifact it is of, whom to trust."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.export.bundle import layout
from limbeck.export.bundle.write import write_bundle
from limbeck.export.bundle.vendor import pinned_requirements
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
from limbeck.registry.provenance import attestation
from limbeck.registry.provenance import sbom as bills
from limbeck.registry.records import NewVersion
from tests.conftest import Result
from tests.export.export_helpers import Exported


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A key that signs, and the file that lists it as ada's."""
    public = signing.create_key(tmp_path / "ada.pem")
    (tmp_path / "trusted").write_text(f"{public} ada\n")
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "ada.pem"))
    monkeypatch.setenv(signing.TRUSTED_KEYS_VARIABLE, str(tmp_path / "trusted"))
    return tmp_path / "trusted"


@pytest.fixture
def registered(store: Store, llama: Exported, trusted: Path) -> Store:
    """coder/1 in fp32 and coder/2 in int8, both with a signed bill."""
    for folder in (llama.fp32, llama.int8):
        version = store.register(NewVersion(name="coder", kind="onnx", engine="onnxruntime"), folder)
        attestation.attest(store, version)
    return store


@pytest.fixture
def bundle(registered: Store, limbeck: Callable[..., Result], tmp_path: Path) -> Path:
    done = limbeck("deploy", "coder/1", "--output", tmp_path / "bundle")
    assert "signed by ada" in done.out, done.err
    return tmp_path / "bundle"


def rehashed(bundle: Path) -> None:
    """As somebody would who changes files of a bundle and makes its manifests fit."""
    write_manifest(bundle / layout.MODEL_FOLDER, **extra_manifest_fields(read_manifest(bundle / layout.MODEL_FOLDER)))
    files = layout.bundle_file_digests(bundle)
    write_json(bundle / MANIFEST, read_manifest(bundle) | {"digest": artifact_digest(files), "files": files})


def test_a_signed_bundle_is_served(bundle: Path, registered: Store) -> None:
    found = find_onnx_artifact(str(bundle))
    assert found.signed_by == "ada"
    assert found.sbom == attestation.sbom_of_ref(registered, "coder/1")
    assert Runtime.load(found.path, threads=1, expected_digest=found.digest).digest == registered.get("coder/1").digest
    pins = (bundle / "requirements.txt").read_text().splitlines()
    assert any(pin.startswith("cryptography==") for pin in pins)
    assert not any(pin.startswith("cryptography==") for pin in pinned_requirements())  # not where nothing is signed


def test_changed_weights_whose_manifests_fit(bundle: Path) -> None:
    weights = bundle / "model/model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    rehashed(bundle)
    with pytest.raises(DamagedArtifact, match="SBOM is of other files"):
        find_onnx_artifact(str(bundle))


def test_a_changed_file_alone(bundle: Path) -> None:
    found = find_onnx_artifact(str(bundle))
    (bundle / "model/config.json").write_text("{}")
    with pytest.raises(DamagedArtifact, match=r"config\.json has sha256"):
        Runtime.load(found.path, threads=1, expected_digest=found.digest)


def test_a_changed_bill(bundle: Path) -> None:
    text = (bundle / bills.SBOM_FILE).read_text()
    (bundle / bills.SBOM_FILE).write_text(text.replace("coder", "other", 1))
    with pytest.raises(DamagedArtifact, match=r"sbom\.json has sha256"):
        find_onnx_artifact(str(bundle))
    rehashed(bundle)
    with pytest.raises(DamagedArtifact, match="the signature of ada does not match"):
        find_onnx_artifact(str(bundle))


def test_the_bill_of_another_version(bundle: Path, registered: Store) -> None:
    other = attestation.sbom_of_ref(registered, "coder/2")
    assert other is not None
    bills.write_sbom(bundle, other)
    rehashed(bundle)
    with pytest.raises(DamagedArtifact, match="is of other files"):
        find_onnx_artifact(str(bundle))


def test_a_bill_or_a_signature_that_is_gone(bundle: Path) -> None:
    (bundle / bills.SIGNATURES_FILE).unlink()
    rehashed(bundle)
    with pytest.raises(BadInput, match="is not signed"):
        find_onnx_artifact(str(bundle))
    (bundle / bills.SBOM_FILE).unlink()
    rehashed(bundle)
    with pytest.raises(BadInput, match="has no SBOM"):
        find_onnx_artifact(str(bundle))


def test_a_key_that_is_not_trusted(
    bundle: Path, trusted: Path, tmp_path: Path, limbeck: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted.write_text(f"{signing.create_key(tmp_path / 'ben.pem')} ben\n")
    for command in (
        ("serve", bundle, "--port", 0),
        ("serve", "coder/1", "--port", 0),
        ("deploy", "coder/1", "--output", "b"),
    ):
        done = limbeck(*command)
        assert (done.code, "not with a key that LIMBECK_TRUSTED_KEYS lists" in done.err) == (2, True), done.err
    assert not Path("b").exists()
    trusted.unlink()
    gone = limbeck("serve", bundle, "--port", 0)
    assert (gone.code, "trusted, which cannot be read" in gone.err) == (2, True)
    monkeypatch.delenv(signing.TRUSTED_KEYS_VARIABLE)
    assert find_onnx_artifact(str(bundle)).signed_by is None


def test_a_folder_without_a_bill(llama: Exported, trusted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="has no SBOM"):
        find_onnx_artifact(str(llama.fp32))
    monkeypatch.delenv(signing.TRUSTED_KEYS_VARIABLE)
    assert find_onnx_artifact(str(llama.fp32)).sbom is None


def test_a_bundle_that_is_replaced_under_a_server(bundle: Path, llama: Exported, tmp_path: Path) -> None:
    found = find_onnx_artifact(str(bundle))
    watched = FolderWatcher(Artifact(found.path, found.name, found.digest), 1.0)
    assert isinstance(watched._read_artifact(), Artifact)
    shutil.rmtree(bundle)
    write_bundle(llama.int8, bundle)  # nobody signed that
    refused = watched._read_artifact()
    assert isinstance(refused, WatchProblem)
    assert "has no SBOM" in refused.message


def test_deploy_tells_the_bill(registered: Store, limbeck: Callable[..., Result], tmp_path: Path) -> None:
    done = limbeck("deploy", "coder/2", "--output", tmp_path / "b", "--format", "json")
    bill = attestation.sbom_of_ref(registered, "coder/2")
    assert bill is not None
    told = json.loads(done.out)
    assert (told["sbom"], told["signed_by"]) == (bill.digest, "ada")
