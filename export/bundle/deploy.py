"""Make a bundle: an ONNX artifact, verified, with the code that serves it and what starts and watches that."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from string import Template
from typing import Any

from limbeck.export.bundle.bundle import CARD, MODEL, bundled_artifact, is_bundle, own_files
from limbeck.export.bundle.vendor import requirements, sources
from limbeck.registry.core.digest import (
    MANIFEST,
    digest_of,
    read_manifest,
    told_fields,
    verify,
    write_json,
    write_manifest,
)
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import written_whole
from limbeck.registry.provenance import sbom as bills
from limbeck.registry.provenance.sbom import Bill

HOST = Path(__file__).parent / "host"  # what starts and watches a server, as string.Template
PROGRAMS = ("start", "health")


def deploy(
    artifact: Path,
    to: Path,
    *,
    digest: str | None = None,
    about: dict[str, Any] | None = None,
    card: str | None = None,
    bill: Bill | None = None,
) -> str:
    """Write the ONNX artifact in `artifact` to the folder `to` with all that serves it. Returns its digest.

    The files are verified before and after they are copied, and take their place only then. An older bundle
    in `to` is replaced.

    Args:
        digest: what the artifact's digest must be; the manifest decides where it is None.
        about: what the bundle's manifests say besides, such as its registered name and version.
        card: the model card, see limbeck.registry.catalog.model_card.
        bill: the bill of materials. Where it is signed, the bundle's requirements have what checks that.

    Raises:
        BadInput: `artifact` is no ONNX artifact, or `to` holds something that is no bundle.
        DamagedArtifact: files that are not those of the digest.
    """
    artifact, to = Path(artifact), Path(to)
    manifest = read_manifest(artifact)
    if manifest.get("kind") != "onnx":
        raise BadInput(f"{artifact} is no ONNX artifact of Limbeck", fix="export it first: limbeck export MODEL")
    if to.exists() and not is_bundle(to) and not (to.is_dir() and not any(to.iterdir())):
        raise BadInput(f"{to} holds something that is no bundle", fix="choose a new folder with --to")
    digest = verify(artifact, digest)
    about = {"model": to.name} | (about or {})
    with written_whole(to) as part:
        for name in manifest["files"]:
            _copy(artifact / name, part / MODEL / name)
        given = told_fields(manifest)
        write_manifest(part / MODEL, **given | about)
        if card is not None:
            (part / CARD).write_text(card, encoding="utf-8")
        for name, source in sources().items():
            _copy(source, part / "lib" / name)
        if bill is not None:
            bills.write(part, bill)
        signed = ["cryptography"] if bill and bill.signatures else []
        python = ".".join(map(str, sys.version_info[:2]))
        pins = "".join(f"{pin}\n" for pin in requirements(*signed))
        (part / "requirements.txt").write_text(f"# Python {python}\n{pins}")
        _write_host(part, about | {"digest": digest, "precision": given["precision"], "python": python})
        files = own_files(part)
        told = {"bundle": True, "artifact": digest, "python": python}
        write_json(part / MANIFEST, {"format": 1, "digest": digest_of(files), "files": files, **about, **told})
        verify(bundled_artifact(part), digest)
    return digest


def _write_host(part: Path, values: dict[str, Any]) -> None:
    for template in HOST.iterdir():
        text = template.read_text()
        plain = template.name in PROGRAMS
        (part / template.name).write_text(text if plain else Template(text).substitute(values))
    for name in PROGRAMS:
        (part / name).chmod(0o755)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
