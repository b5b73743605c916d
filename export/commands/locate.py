"""Which artifact a MODEL of the export room's commands means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.export.bundle.bundle import bill_beside, bundled_artifact, is_bundle
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.provenance.sbom import Bill, check

if TYPE_CHECKING:
    from limbeck.registry.records import Version


@dataclass(frozen=True)
class Found:
    """The artifact that a MODEL means."""

    path: Path
    name: str
    engine: str
    digest: str | None  # None: its manifest decides, when it is loaded
    version: Version | None = None  # that is registered
    bill: Bill | None = None  # of materials; `find_onnx` looks for it, and for who signed it
    signed_by: str | None = None  # by the file of trusted keys; None where none is configured


def find(text: str) -> Found:
    """As `limbeck.registry.catalog.model_ref.resolve`; an ONNX folder without it, as a serving host needs."""
    folder = Path(text).expanduser()
    bundled = is_bundle(folder)
    if bundled:
        folder = bundled_artifact(folder)
    if bundled or (folder / "model.onnx").is_file():
        name = read_manifest(folder).get("model") or folder.resolve().name
        return Found(folder, str(name), "onnxruntime", None)
    try:
        from limbeck.registry.catalog.model_ref import resolve
    except ModuleNotFoundError:
        raise BadInput(f"{text} is no bundle, and on this host there is no registry") from None
    model = resolve(text)
    return Found(model.path, model.label, model.engine, model.digest, model.version)


def find_onnx(text: str) -> Found:
    """As `find`, with its bill of materials, which is held against the artifact and the keys that are trusted.

    Raises:
        BadInput: a torch model, naming the ONNX variants there are; or no trusted key signed the bill.
        DamagedArtifact: the bill was changed, or is of another artifact.
    """
    found = find(text)
    if found.engine == "onnxruntime":
        return _with_bill(found, text)
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


def _with_bill(found: Found, text: str) -> Found:
    if found.version is None:
        bill = bill_beside(found.path)
    else:
        from limbeck.registry.mlflow.store import Store
        from limbeck.registry.provenance import attestation

        bill = attestation.named(Store(), text if "@" in text else found.version.ref)
    digest = found.digest or str(read_manifest(found.path).get("digest"))
    signer = check(bill, digest, found.name)
    return replace(found, bill=bill, signed_by=signer, digest=digest if bill else found.digest)
