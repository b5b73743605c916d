"""The digest of an artifact: SHA-256 over its files. Standard library only, so a serving host can use it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.registry.core.errors import DamagedArtifact

MANIFEST = "limbeck.json"
# Written after the artifact is made, the last one by MLflow when it loads a registered version. They do not count.
NON_CONTENT_FILES = {MANIFEST, "README.md", "registered_model_meta"}


def text_digest(text: str | bytes) -> str:
    """Hex SHA-256 of a text (UTF-8) or of bytes."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def json_digest(value: Any) -> str:
    """Hex SHA-256 of a value as JSON, independent of the order of its keys."""
    return text_digest(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str))


def file_digest(path: Path) -> str:
    """Hex SHA-256 of one file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Relative POSIX path -> hex SHA-256 of every content file below `folder`, sorted by path.

    Raises DamagedArtifact if the folder holds anything other than files and folders.
    """
    if problems := list(_invalid_paths(folder)):
        raise DamagedArtifact(folder, problems)
    paths = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    names = {p.relative_to(folder).as_posix(): p for p in paths}
    return {name: file_digest(path) for name, path in names.items() if name not in NON_CONTENT_FILES}


def _invalid_paths(folder: Path) -> Iterator[str]:
    """What a folder may not hold: links that lead out of it, links to folders, and special files such as pipes.

    Links to `../../blobs` are allowed: the files of the Hugging Face cache are such links.
    """
    root = Path(folder).resolve()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not name.isascii() and name != name.encode(errors="replace").decode():
            yield f"the name {name!r} is not UTF-8"
        elif path.is_symlink():
            target = Path(os.path.normpath(path.parent / os.readlink(path)))
            if not (target.is_relative_to(root) or target.is_relative_to(root.parent.parent / "blobs")):
                yield f"{name} is a link out of the folder"
            elif not path.is_file():
                yield f"{name} is a link to something that is not a file"
        elif not (path.is_file() or path.is_dir()):
            yield f"{name} is neither a file nor a folder"


def artifact_digest(files: dict[str, str]) -> str:
    """The digest of an artifact, given the digest of each file."""
    return text_digest("".join(f"{name}\0{files[name]}\n" for name in sorted(files)))


def folder_digest(folder: Path) -> str:
    """The digest that identifies the artifact in `folder`: 64 hex digits."""
    return artifact_digest(file_digests(folder))


def verify_files(folder: Path, expected: str | None = None) -> str:
    """Compare the files below `folder` with its manifest, if it has one, and with the digest `expected`, if given.

    Returns the digest. Raises DamagedArtifact with the files that are missing, changed or extra.
    """
    folder = Path(folder)
    actual = file_digests(folder)
    manifest_file = folder / MANIFEST
    manifest = read_manifest(folder) if manifest_file.exists() else {}
    problems = describe_file_differences(actual, manifest.get("files", actual)) + describe_manifest_changes(folder)
    digest = artifact_digest(actual)
    if not problems and expected is not None and digest != expected:
        problems = [f"digest is {digest[:12]}, expected {expected[:12]}"]
    if problems:
        raise DamagedArtifact(folder, problems)
    return digest


def describe_file_differences(actual: dict[str, str], recorded: dict[str, str]) -> list[str]:
    """What is wrong with files, given their actual digests and the recorded ones."""
    problems = [f"{name} is missing" for name in sorted(recorded.keys() - actual.keys())]
    problems += [f"{name} was added" for name in sorted(actual.keys() - recorded.keys())]
    return problems + [
        f"{name} has sha256 {actual[name][:12]}, recorded {recorded[name][:12]}"
        for name in sorted(actual.keys() & recorded.keys())
        if actual[name] != recorded[name]
    ]


def write_manifest(folder: Path, **fields: Any) -> str:
    """Write `limbeck.json` into an artifact folder: its files, its digest and `fields`. Returns the digest."""
    files = file_digests(folder)
    digest = artifact_digest(files)
    write_json(Path(folder) / MANIFEST, {"format": 1, "digest": digest, "files": files, **fields})
    return digest


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a manifest as JSON."""
    file.write_text(_to_json(value))


def _to_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"


def describe_manifest_changes(folder: Path) -> list[str]:
    """What is wrong with the form of a folder's manifest, which lists no digest of its own: any byte too many."""
    path = Path(folder) / MANIFEST
    if not path.is_file() or path.read_text() == _to_json(read_manifest(folder)):
        return []
    return [f"{MANIFEST} was changed after it was written"]


def extra_manifest_fields(manifest: dict[str, Any]) -> dict[str, Any]:
    """The fields of a manifest that `write_manifest` was given, without those it computes."""
    return {key: value for key, value in manifest.items() if key not in ("format", "digest", "files")}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact folder; {} if it has none. Raises DamagedArtifact if it is unreadable."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DamagedArtifact(folder, [f"{MANIFEST} is not JSON: {error}"]) from None
    if not isinstance(manifest, dict):
        raise DamagedArtifact(folder, [f"{MANIFEST} is not a JSON object"])
    files = manifest.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise DamagedArtifact(folder, [f"the files of {MANIFEST} are not names with digests"])
    return manifest
