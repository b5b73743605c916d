"""Make a bundle: an ONNX artifact, verified, with the code that serves it and what starts and watches that."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from string import Template
from typing import Any

from limbeck.export.bundle.bundle import (
    MODEL_CARD,
    MODEL_FOLDER,
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
from limbeck.registry.provenance import sbom as bills
from limbeck.registry.provenance.sbom import Sbom

HOST_TEMPLATES = Path(__file__).parent / "host"  # what starts and watches a server, as string.Template
PROGRAMS = ("start", "health")


def write_bundle(
    artifact: Path,
    output_folder: Path,
    *,
    digest: str | None = None,
    manifest_fields: dict[str, Any] | None = None,
    model_card: str | None = None,
    sbom: Sbom | None = None,
) -> str:
    """Write the ONNX artifact in `artifact` to the folder `output_folder` with all that serves it. Returns its digest.

    The files are verified before and after they are copied, and take their place only then. An older bundle
    in `output_folder` is replaced.

    Args:
        digest: what the artifact's digest must be; the manifest decides where it is None.
        manifest_fields: what the bundle's manifests say besides, such as its registered name and version.
        model_card: the model card, see limbeck.registry.catalog.model_card.
        sbom: the bill of materials. Where it is signed, the bundle's requirements have what checks that.

    Raises:
        BadInput: `artifact` is no ONNX artifact, or `output_folder` holds something that is no bundle.
        DamagedArtifact: files that are not those of the digest.
    """
    artifact, output_folder = Path(artifact), Path(output_folder)
    manifest = read_manifest(artifact)
    if manifest.get("kind") != "onnx":
        raise BadInput(f"{artifact} is no ONNX artifact of Limbeck", fix="export it first: limbeck export MODEL")
    if (
        output_folder.exists()
        and not is_bundle(output_folder)
        and not (output_folder.is_dir() and not any(output_folder.iterdir()))
    ):
        raise BadInput(f"{output_folder} holds something that is no bundle", fix="choose a new folder with --to")
    digest = verify_files(artifact, digest)
    manifest_fields = {"model": output_folder.name} | (manifest_fields or {})
    with atomic_write(output_folder) as part:
        for name in manifest["files"]:
            _copy(artifact / name, part / MODEL_FOLDER / name)
        given = extra_manifest_fields(manifest)
        write_manifest(part / MODEL_FOLDER, **given | manifest_fields)
        if model_card is not None:
            (part / MODEL_CARD).write_text(model_card, encoding="utf-8")
        for name, source in source_files().items():
            _copy(source, part / "lib" / name)
        if sbom is not None:
            bills.write_sbom(part, sbom)
        signed = ["cryptography"] if sbom and sbom.signatures else []
        python = ".".join(map(str, sys.version_info[:2]))
        pins = "".join(f"{pin}\n" for pin in pinned_requirements(*signed))
        (part / "requirements.txt").write_text(f"# Python {python}\n{pins}")
        _write_host(part, manifest_fields | {"digest": digest, "precision": given["precision"], "python": python})
        files = bundle_file_digests(part)
        told = {"bundle": True, "artifact": digest, "python": python}
        write_json(
            part / MANIFEST, {"format": 1, "digest": artifact_digest(files), "files": files, **manifest_fields, **told}
        )
        verify_files(verified_artifact_folder(part), digest)
    return digest


def _write_host(part: Path, values: dict[str, Any]) -> None:
    for template in HOST_TEMPLATES.iterdir():
        text = template.read_text()
        plain = template.name in PROGRAMS
        (part / template.name).write_text(text if plain else Template(text).substitute(values))
    for name in PROGRAMS:
        (part / name).chmod(0o755)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
