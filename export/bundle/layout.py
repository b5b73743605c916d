"""What a bundle holds. A host without the registry serves from it.

model/                    the artifact: graph, weights, tokenizer, its own limbeck.json and model card (README.md)
lib/limbeck/              the modules of Limbeck that serve (vendor.py)
requirements.txt          the packages they need, pinned (vendor.py)
start, health             programs: start the server; ask whether it is healthy (host/)
README.md                 how to run the bundle (host/)
limbeck.service           systemd unit (host/)
Containerfile             image for podman or docker (host/)
sbom.json                 the SBOM of a registered model; its signatures are in sbom.signatures.json
limbeck.json              the manifest: SHA-256 of each file outside model/, and of model/'s manifest and card
"""

from __future__ import annotations

from pathlib import Path

from limbeck.registry.core.digest import (
    MANIFEST,
    describe_file_differences,
    describe_manifest_changes,
    file_digest,
    read_manifest,
)
from limbeck.registry.core.errors import DamagedArtifact
from limbeck.registry.provenance import sbom

MODEL_FOLDER = "model"
MODEL_MANIFEST = f"{MODEL_FOLDER}/{MANIFEST}"
MODEL_CARD = f"{MODEL_FOLDER}/README.md"  # only if a registered version is deployed
LIBRARY_FOLDER = "lib"
REQUIREMENTS_FILE = "requirements.txt"


def is_bundle(folder: Path) -> bool:
    """Return True if `limbeck deploy` wrote `folder`."""
    return folder.is_dir() and (folder / MANIFEST).is_file() and bool(read_manifest(folder).get("bundle"))


def verified_artifact_folder(folder: Path) -> Path:
    """Check a bundle's files and return its artifact's folder. The artifact's own files are checked at load.

    Raises DamagedArtifact, naming the files that are missing, changed or extra.
    """
    problems = describe_file_differences(bundle_file_digests(folder), read_manifest(folder).get("files", {}))
    if problems := problems + describe_manifest_changes(folder):
        raise DamagedArtifact(folder, problems)
    return folder / MODEL_FOLDER


def sbom_of_artifact(artifact: Path) -> sbom.Sbom | None:
    """Read the SBOM of the bundle that holds the folder `artifact`; None if there is no bundle or no SBOM.

    Raises DamagedArtifact if the SBOM cannot be read.
    """
    return sbom.read_sbom(artifact.parent) if is_bundle(artifact.parent) else None


def bundle_file_digests(folder: Path) -> dict[str, str]:
    """Map relative POSIX path -> hex SHA-256 of the files that a bundle's manifest lists.

    Leaves out the manifest itself, Python's caches, and the content of the artifact except its manifest and model card.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_artifact_content = name.startswith(f"{MODEL_FOLDER}/") and name not in (MODEL_MANIFEST, MODEL_CARD)
        if path.is_file() and not is_artifact_content and name != MANIFEST and "__pycache__" not in path.parts:
            digests[name] = file_digest(path)
    return digests
