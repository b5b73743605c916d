"""Write a bundle: a verified ONNX artifact, the code that serves it, and the programs that start and monitor it."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path
from string import Template
from typing import Any

from limbeck.export.bundle.hashes import with_hashes
from limbeck.export.bundle.layout import (
    LIBRARY_FOLDER,
    MODEL_CARD,
    MODEL_FOLDER,
    REQUIREMENTS_FILE,
    bundle_file_digests,
    is_bundle,
    verified_artifact_folder,
)
from limbeck.export.bundle.vendor import pinned_requirements, source_files
from limbeck.registry.core.digest import (
    MANIFEST,
    artifact_digest,
    extra_manifest_fields,
    read_manifest,
    verify_files,
    write_json,
    write_manifest,
)
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import atomic_write
from limbeck.registry.provenance.sbom import Sbom, write_sbom

HOST_TEMPLATES = Path(__file__).parent / "host"  # string.Template files, except PROGRAMS
PROGRAMS = ("start", "health")  # copied unchanged, and executable


def write_bundle(
    artifact: Path,
    output_folder: Path,
    *,
    digest: str | None = None,
    manifest_fields: dict[str, Any] | None = None,
    model_card: str | None = None,
    sbom: Sbom | None = None,
    hashes: bool = False,
) -> str:
    """Write the ONNX artifact in `artifact` to `output_folder` with everything that serves it. Returns its digest.

    The files are verified before and after the copy, and `output_folder` changes only if both checks pass. An older
    bundle in `output_folder` is replaced.

    Args:
        digest: the digest that the artifact must have; None trusts its manifest.
        manifest_fields: extra fields of both manifests, such as the registered name and version as `model`.
        model_card: the model card, see limbeck.registry.catalog.model_card.
        hashes: ask pip for the hashes of the packages in the requirements; it needs its index.
        sbom: the SBOM. If it is signed, the requirements include the package that checks signatures.

    Raises:
        BadInput: `artifact` is not an ONNX artifact, `output_folder` holds something else than a bundle, or pip does
            not find the packages.
        DamagedArtifact: the files do not match the digest.
    """
    artifact, output_folder = Path(artifact), Path(output_folder)
    manifest = read_manifest(artifact)
    if manifest.get("kind") != "onnx":
        raise BadInput(f"{artifact} is not an ONNX artifact of Limbeck", fix="export it first: limbeck export MODEL")
    _check_output_folder(output_folder)
    digest = verify_files(artifact, digest)
    fields = {"model": output_folder.name} | (manifest_fields or {})
    python = ".".join(map(str, sys.version_info[:2]))
    with atomic_write(output_folder) as part:
        for name in manifest["files"]:
            _copy(artifact / name, part / MODEL_FOLDER / name)
        write_manifest(part / MODEL_FOLDER, **extra_manifest_fields(manifest) | fields)
        if model_card is not None:
            (part / MODEL_CARD).write_text(model_card, encoding="utf-8")
        if sbom is not None:
            write_sbom(part, sbom)
        for name, source in source_files().items():
            _copy(source, part / LIBRARY_FOLDER / name)
        _write_requirements(part, python, sbom, hashes)
        _write_host_files(part, fields | {"digest": digest, "precision": manifest["precision"], "python": python})
        _write_bundle_manifest(part, fields | {"bundle": True, "artifact": digest, "python": python})
        verify_files(verified_artifact_folder(part), digest)
    return digest


def _check_output_folder(folder: Path) -> None:
    """Raise BadInput unless `folder` is absent, empty or a bundle."""
    if not folder.exists() or is_bundle(folder):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise BadInput(f"{folder} exists and is not a bundle", fix="choose a new folder with --output")


def _write_requirements(part: Path, python: str, sbom: Sbom | None, hashes: bool) -> None:
    signature_packages = ["cryptography"] if sbom and sbom.signatures else []
    pins = pinned_requirements(*signature_packages)
    platform = f" on {sysconfig.get_platform()}" if hashes else ""
    lines = [f"# Python {python}{platform}", *(with_hashes(pins) if hashes else pins)]
    (part / REQUIREMENTS_FILE).write_text("\n".join(lines) + "\n")


def _write_host_files(part: Path, values: dict[str, Any]) -> None:
    for template in HOST_TEMPLATES.iterdir():
        text = template.read_text()
        is_program = template.name in PROGRAMS
        (part / template.name).write_text(text if is_program else Template(text).substitute(values))
    for name in PROGRAMS:
        (part / name).chmod(0o755)


def _write_bundle_manifest(part: Path, fields: dict[str, Any]) -> None:
    files = bundle_file_digests(part)
    write_json(part / MANIFEST, {"format": 1, "digest": artifact_digest(files), "files": files, **fields})


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
