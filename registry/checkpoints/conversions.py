"""Converts models in other forms, once, to the folder of config.json, safetensors and tokenizer that Limbeck takes.

The result is stored in `checkpoints/` of Limbeck's home under the digest of its source. Its manifest says from which
files it was made, and with which packages.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from limbeck.registry.core.digest import MANIFEST, file_digest, json_digest, verify_files, write_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.home import atomic_write, home, machine_lock
from limbeck.registry.core.terminal import format_bytes, print_status

CHECKPOINTS = "checkpoints"
FORMAT = 1  # raised when a conversion gives other results: the stored ones are then made again
# What a tokenizer is loaded from, and the card of a model, which has its licence.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
CARD = "README.md"
PACKAGES = ("transformers", "tokenizers", "torch", "safetensors", "gguf", "peft")


class Converted(NamedTuple):
    """A checkpoint in Limbeck's home: its folder and the digest of its files."""

    path: Path
    digest: str


def converted_checkpoint(
    kind: str, files: dict[str, Path | str], convert: Callable[[Path], None], name: str
) -> Converted:
    """A converted checkpoint; converts it if it is not stored whole.

    Args:
        kind: of the source: "gguf", "adapter", "mxfp4" ...
        files: the files of the source by what they are called in the manifest, or digests of whole folders.
        convert: writes the checkpoint into an empty folder.
        name: what the status line calls the source.

    Raises what `convert` raises.
    """
    digests = {key: value if isinstance(value, str) else file_digest(value) for key, value in sorted(files.items())}
    key = json_digest([FORMAT, kind, digests])
    folder = home() / CHECKPOINTS / key
    with machine_lock(f"{CHECKPOINTS}-{key}"):
        digest = _stored_digest(folder)
        if digest is not None:
            return Converted(folder, digest)
        sizes = [path.stat().st_size for path in files.values() if isinstance(path, Path)]
        print_status(f"  converting {name} ({kind}, {format_bytes(sum(sizes))}) to a checkpoint in float32, once")
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            convert(temporary)
            source = {"kind": kind, "files": digests, "packages": _package_versions()}
            digest = write_manifest(temporary, source=source)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print_status(f"  {name}: {format_bytes(size)} in {folder}")
    return Converted(folder, digest)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer, and the model's card, which states the licence."""
    for name in (*TOKENIZER_FILES, CARD):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def require_disk(target: Path, size: int, name: str) -> None:
    """Raise BadInput if a conversion of `size` bytes would fill the disk of `target`."""
    free = shutil.disk_usage(target).free
    if size > free:
        raise BadInput(
            f"{name} becomes {format_bytes(size)} in float32, and {target} has {format_bytes(free)} free",
            fix="free some space, or move Limbeck's home: LIMBECK_HOME=FOLDER",
        )


def _stored_digest(folder: Path) -> str | None:
    """The digest of a stored conversion; None if there is none, or if its files were changed."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return verify_files(folder)
    except DamagedArtifact:
        return None


def _package_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
