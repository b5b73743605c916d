"""A bundle: a verified copy of an ONNX artifact that needs no registry, for a serving host."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from registry.digest import MANIFEST, file_digests, read_manifest, verify, write_manifest
from registry.errors import BadInput
from registry.home import written_whole

README = """# {name}

An ONNX artifact of Limbeck: {precision}, digest `{digest}`.
`limbeck.json` lists its files with their digests, its lineage and how it compares with PyTorch.

Serve it with an OpenAI-compatible API:

    limbeck serve {folder}

Or load it; this takes numpy, onnxruntime and tokenizers, no torch:

    from export.runtime import Runtime
    runtime = Runtime.load("{folder}")
    print(runtime.generate(["Once upon a time"], max_new_tokens=32)[0].text)
"""


def deploy(artifact: Path, to: Path, *, digest: str | None = None, about: dict[str, Any] | None = None) -> str:
    """Copy the ONNX artifact in `artifact` to the folder `to`. Returns its digest.

    The files are verified before and after they are copied, and take their place only then. An older bundle
    in `to` is replaced.

    Args:
        digest: what the artifact's digest must be; the manifest decides where it is None.
        about: what the bundle's manifest says besides, such as its registered name and version.

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
    with written_whole(to) as part:
        for name in file_digests(artifact):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact / name, part / name)
        verify(part, digest)
        given = {key: value for key, value in manifest.items() if key not in ("format", "digest", "files")}
        write_manifest(part, **given | (about or {}) | {"bundle": True})
        name = (about or {}).get("model", to.name)
        (part / "README.md").write_text(
            README.format(name=name, folder=to, digest=digest, precision=given["precision"])
        )
    return digest


def is_bundle(folder: Path) -> bool:
    """True where `folder` was written by `deploy`."""
    return folder.is_dir() and (folder / MANIFEST).is_file() and bool(read_manifest(folder).get("bundle"))
