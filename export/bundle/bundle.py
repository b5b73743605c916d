"""A bundle: a folder with an ONNX artifact and all that serves it, for a host without the registry."""

from __future__ import annotations

from pathlib import Path

from limbeck.registry.core.digest import MANIFEST, differences, file_digest, read_manifest
from limbeck.registry.core.errors import DamagedArtifact
from limbeck.registry.provenance import sbom

MODEL = "model"  # the folder of the artifact; its own manifest tells its files
CARD = f"{MODEL}/README.md"  # the model card, where a registered version is deployed


def is_bundle(folder: Path) -> bool:
    """True where `folder` was written by `limbeck deploy`."""
    return folder.is_dir() and (folder / MANIFEST).is_file() and bool(read_manifest(folder).get("bundle"))


def bundled_artifact(folder: Path) -> Path:
    """The artifact's folder in a bundle whose other files are checked; the artifact's own are when it is loaded.

    Raises DamagedArtifact, naming the files that are missing, changed or extra.
    """
    if problems := differences(own_files(folder), read_manifest(folder).get("files", {})):
        raise DamagedArtifact(folder, problems)
    return folder / MODEL


def bill_beside(artifact: Path) -> sbom.Bill | None:
    """The bill of materials in the bundle that an artifact's folder is of; None where there is none.

    Raises DamagedArtifact where it cannot be read.
    """
    return sbom.read(artifact.parent) if is_bundle(artifact.parent) else None


def own_files(folder: Path) -> dict[str, str]:
    """Relative POSIX path -> hex SHA-256 of a bundle's files: all but its manifest and the artifact's content.

    The artifact's manifest and its model card are among them. What Python compiles is not.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        content = name.startswith(f"{MODEL}/") and name not in (f"{MODEL}/{MANIFEST}", CARD)
        if path.is_file() and not content and name != MANIFEST and "__pycache__" not in path.parts:
            digests[name] = file_digest(path)
    return digests
