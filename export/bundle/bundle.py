"""A bundle: a folder with an ONNX artifact and all that serves it, for a host without the registry."""

from __future__ import annotations

from pathlib import Path

from limbeck.registry.core.digest import MANIFEST, describe_file_differences, file_digest, read_manifest
from limbeck.registry.core.errors import DamagedArtifact
from limbeck.registry.provenance import sbom

MODEL_FOLDER = "model"  # the folder of the artifact; its own manifest tells its files
MODEL_CARD = f"{MODEL_FOLDER}/README.md"  # the model card, where a registered version is deployed


def is_bundle(folder: Path) -> bool:
    """True where `folder` was written by `limbeck deploy`."""
    return folder.is_dir() and (folder / MANIFEST).is_file() and bool(read_manifest(folder).get("bundle"))


def verified_artifact_folder(folder: Path) -> Path:
    """The artifact's folder in a bundle whose other files are checked; the artifact's own are when it is loaded.

    Raises DamagedArtifact, naming the files that are missing, changed or extra.
    """
    if problems := describe_file_differences(bundle_file_digests(folder), read_manifest(folder).get("files", {})):
        raise DamagedArtifact(folder, problems)
    return folder / MODEL_FOLDER


def sbom_of_artifact(artifact: Path) -> sbom.Sbom | None:
    """The bill of materials in the bundle that an artifact's folder is of; None where there is none.

    Raises DamagedArtifact where it cannot be read.
    """
    return sbom.read_sbom(artifact.parent) if is_bundle(artifact.parent) else None


def bundle_file_digests(folder: Path) -> dict[str, str]:
    """Relative POSIX path -> hex SHA-256 of a bundle's files: all but its manifest and the artifact's content.

    The artifact's manifest and its model card are among them. What Python compiles is not.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        content = name.startswith(f"{MODEL_FOLDER}/") and name not in (f"{MODEL_FOLDER}/{MANIFEST}", MODEL_CARD)
        if path.is_file() and not content and name != MANIFEST and "__pycache__" not in path.parts:
            digests[name] = file_digest(path)
    return digests
