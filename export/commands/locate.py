"""Which artifact a MODEL of the export room's commands means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.export.bundle.bundle import is_bundle, sbom_of_artifact, verified_artifact_folder
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.provenance.sbom import Sbom, verify_sbom

if TYPE_CHECKING:
    from limbeck.registry.records import Version


@dataclass(frozen=True)
class FoundArtifact:
    """The artifact that a MODEL means."""

    path: Path
    name: str
    engine: str
    digest: str | None  # None: its manifest decides, when it is loaded
    version: Version | None = None  # that is registered
    sbom: Sbom | None = None  # of materials; `find_onnx` looks for it, and for who signed it
    signed_by: str | None = None  # by the file of trusted keys; None where none is configured


def find_artifact(text: str) -> FoundArtifact:
    """As `limbeck.registry.catalog.model_ref.resolve_model`; an ONNX folder without it, as a serving host needs."""
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
        raise BadInput(f"{text} is no bundle, and on this host there is no registry") from None
    model = resolve_model(text)
    return FoundArtifact(model.path, model.label, model.engine, model.digest, model.version)


def find_onnx_artifact(text: str) -> FoundArtifact:
    """As `find`, with its bill of materials, which is held against the artifact and the keys that are trusted.

    Raises:
        BadInput: a torch model, naming the ONNX variants there are; or no trusted key signed the bill.
        DamagedArtifact: the bill was changed, or is of another artifact.
    """
    found = find_artifact(text)
    if found.engine == "onnxruntime":
        return _with_sbom(found, text)
    name, _, version = found.name.rpartition("/")
    variants = []
    if name and version.isdecimal() and not Path(text).is_dir():
        from limbeck.registry.mlflow.store import Store

        variants = [v for v in Store().versions(name) if v.kind == "onnx" and v.parent == found.name]
    there = ", ".join(f"{variant.ref} ({variant.precision})" for variant in variants)
    raise BadInput(
        f"{text} is a torch model; what is deployed and served is ONNX",
        fix=f"its ONNX variants: {there}" if there else f"export it first: limbeck export {text}",
    )


def _with_sbom(found: FoundArtifact, text: str) -> FoundArtifact:
    if found.version is None:
        bill = sbom_of_artifact(found.path)
    else:
        from limbeck.registry.mlflow.store import Store
        from limbeck.registry.provenance import attestation

        bill = attestation.sbom_of_ref(Store(), text if "@" in text else found.version.ref)
    digest = found.digest or str(read_manifest(found.path).get("digest"))
    signer = verify_sbom(bill, digest, found.name)
    return replace(found, sbom=bill, signed_by=signer, digest=digest if bill else found.digest)
