"""Find the artifact that the MODEL argument of an export command names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.export.bundle.layout import is_bundle, sbom_of_artifact, verified_artifact_folder
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.provenance.sbom import Sbom, verify_sbom

if TYPE_CHECKING:
    from limbeck.registry.records import Version


@dataclass(frozen=True)
class FoundArtifact:
    """The artifact that a MODEL names.

    Attributes:
        digest: None if it is known only from the manifest; it is checked at load.
        version: the registered version, or None.
        sbom, signed_by: the SBOM and who signed it; only `find_onnx_artifact` sets them. `signed_by` is None if no
            file of trusted keys is configured.
    """

    path: Path
    name: str
    engine: str
    digest: str | None
    version: Version | None = None
    sbom: Sbom | None = None
    signed_by: str | None = None


def find_artifact(text: str) -> FoundArtifact:
    """Find the model that `text` names. Bundles and ONNX folders need no registry, as on a serving host.

    Other texts are resolved by limbeck.registry.catalog.model_ref. Raises BadInput, DamagedArtifact.
    """
    folder = Path(text).expanduser()
    bundled = is_bundle(folder)
    if bundled:
        folder = verified_artifact_folder(folder)
    if bundled or (folder / "model.onnx").is_file():
        name = read_manifest(folder).get("model") or folder.resolve().name
        return FoundArtifact(folder, str(name), "onnxruntime", None)
    try:
        from limbeck.registry.catalog.model_ref import resolve_model
    except ModuleNotFoundError:
        raise BadInput(f"{text} is not a bundle, and this host has no registry") from None
    model = resolve_model(text)
    return FoundArtifact(model.path, model.label, model.engine, model.digest, model.version)


def find_onnx_artifact(text: str) -> FoundArtifact:
    """Find the ONNX artifact that `text` names, and check its SBOM against its files and the trusted keys.

    Raises:
        BadInput: a PyTorch model (the error names its ONNX variants), or no trusted key signed the SBOM.
        DamagedArtifact: the SBOM was changed, or belongs to another artifact.
    """
    found = find_artifact(text)
    if found.engine != "onnxruntime":
        message = f"{text} is a PyTorch model; deploy and serve take an ONNX artifact"
        raise BadInput(message, fix=_export_hint(found, text))
    return _with_sbom(found, text)


def _export_hint(found: FoundArtifact, text: str) -> str:
    """List the ONNX variants of a registered PyTorch model, or the command that makes one."""
    name, _, version = found.name.rpartition("/")
    if name and version.isdecimal() and not Path(text).is_dir():
        from limbeck.registry.mlflow.store import Store

        variants = [v for v in Store().versions(name) if v.kind == "onnx" and v.parent == found.name]
        if variants:
            return "its ONNX variants: " + ", ".join(f"{variant.ref} ({variant.precision})" for variant in variants)
    return f"export it first: limbeck export {text}"


def _with_sbom(found: FoundArtifact, text: str) -> FoundArtifact:
    if found.version is None:
        sbom = sbom_of_artifact(found.path)
    else:
        from limbeck.registry.mlflow.store import Store
        from limbeck.registry.provenance import attestation

        sbom = attestation.sbom_of_ref(Store(), text if "@" in text else found.version.ref)
    digest = found.digest or str(read_manifest(found.path).get("digest"))
    signer = verify_sbom(sbom, digest, found.name)
    return replace(found, sbom=sbom, signed_by=signer, digest=digest if sbom else found.digest)
