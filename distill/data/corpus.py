"""The text of a recipe's `[data]`: documents from its source, split into training and held-out text on disk.

Sources: the standard library, text files and folders (here), and tables (`tables`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from limbeck.distill.data.document import Document
from limbeck.distill.data.tables import table_documents
from limbeck.distill.recipe.schema import Data, table_format
from limbeck.registry.core import jsonl
from limbeck.registry.core.digest import text_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home

# Tests, vendored copies and generated tables do not show how library code is written.
EXCLUDED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip",
    "__pycache__", "pydoc_data", "turtledemo", "encodings", "_vendor", "config-3",
}  # fmt: skip


class Corpus(NamedTuple):
    """A recipe's text on disk: the files, which hold a `Document` as JSON in each line, and their digest."""

    train: Path
    heldout: Path
    digest: str
    train_documents: int
    heldout_documents: int
    train_bytes: int
    heldout_bytes: int


# --- sources of documents


def load_documents(data: Data, recipe_folder: Path) -> Iterable[Document]:
    """The documents that a recipe's `[data]` names."""
    if data.kind == "stdlib":
        return stdlib_documents()
    path = locate_data(data, recipe_folder)
    if data.kind == "text":
        return text_documents(Path(path))
    return (document for document, _ in table_documents(data, path))


def locate_data(data: Data, recipe_folder: Path) -> str:
    """The path to open for `data.path`, searched beside the recipe and then here; or a hub id. Raises BadInput."""
    path = Path(data.path or "").expanduser()
    found = next((p for p in (recipe_folder / path, path) if p.exists()), None)
    if found is None and (data.kind == "text" or table_format(path)):
        raise BadInput(f"data.path {data.path!r} does not exist", fix=f"looked in {recipe_folder} and in {Path.cwd()}")
    return str(found or data.path)


def stdlib_documents() -> Iterator[Document]:
    """The source files of the running Python's standard library, with paths relative to it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: list[Path] = []
    for folder, folders, files in os.walk(root):  # never into site-packages, which may be large
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS and not name.startswith("config-")]
        paths += (Path(folder, name) for name in files if name.endswith(".py"))
    for path in sorted(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield Document(path.relative_to(root).as_posix(), text)


def text_documents(path: Path, characters: int = 2000) -> Iterator[Document]:
    """The documents of a folder (its files) or of a text file.

    A text file is cut at the first blank line after `characters`, or at the end of any line after four times as many.
    """
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
            yield Document(file.relative_to(path).as_posix(), "".join(_lines(file)))
        return
    lines: list[str] = []
    size = number = 0
    for line in _lines(path):
        lines.append(line)
        size += len(line)
        if (size >= characters and not line.strip()) or size >= 4 * characters:
            yield Document(f"{path.name}:{number:05d}", "".join(lines))
            lines, size, number = [], 0, number + 1
    if lines:
        yield Document(f"{path.name}:{number:05d}", "".join(lines))


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text", fix="convert it, or leave it out of data.path") from None


# --- training and held-out text on disk


def is_heldout(path: str, fraction: float) -> bool:
    """Whether a document is held out. Depends on its path alone, so added documents do not change the split."""
    return int(text_digest(path)[:12], 16) / 16**12 < fraction


def prepare_corpus(data: Data, recipe_folder: Path, name: str) -> Corpus:
    """Write a recipe's text under `home()/data/<name>`. Raises BadInput if there is too little of it."""
    return write_corpus(load_documents(data, recipe_folder), name, data.heldout, f"the text ({data.path or data.kind})")


def write_corpus(documents: Iterable[Document], name: str, heldout: float, description: str) -> Corpus:
    """Write documents to `home()/data/<name>`, split into training and held-out text, in one atomic step.

    Orders the documents by the hash of their path, so that any prefix is a fair sample. Never holds all of them in
    memory. Moves other text in that folder to `<name>-<its digest>`, for the versions that were made from it.

    Args:
        documents: those without text are dropped.
        heldout: share of the documents to hold out.
        description: what to call the text in an error.

    Raises:
        BadInput: no text, or no document for one of the two parts.
    """
    from filelock import FileLock

    folder = home() / "data" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")), TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        new = Path(scratch) / "text"
        new.mkdir()
        text = _write_parts(_order_by_hash(documents, Path(scratch) / "rows.jsonl"), new, heldout)
        if not (text.train_documents and text.heldout_documents):
            part = "train" if text.heldout_documents else "heldout"
            count = text.train_documents + text.heldout_documents
            raise BadInput(
                f"{description} leaves no {part} document: it has {count} in all",
                fix=f"give more text, or another data.heldout than {heldout}",
            )
        before = jsonl.corpus_digest_in(folder)
        if before != text.digest:
            if folder.exists():
                aside = folder.with_name(f"{name}-{before[:12] if before else 'unknown'}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)
            os.replace(new, folder)
    return text._replace(train=folder / "train.jsonl", heldout=folder / "heldout.jsonl")


def _order_by_hash(documents: Iterable[Document], rows: Path) -> Iterator[tuple[Document, bytes]]:
    """Documents with their JSON lines, ordered by the hash of their path; the file `rows` stores them meanwhile."""
    offsets = []
    with open(rows, "w+b") as file:
        for document in documents:
            if document.text.strip():
                offsets.append((bytes.fromhex(text_digest(document.path)), file.tell()))
                fields = {key: value for key, value in document._asdict().items() if value or key in jsonl.KEYS}
                file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
        for _, offset in sorted(offsets):
            file.seek(offset)
            line = file.readline()
            yield _document(json.loads(line)), line


def _write_parts(ordered: Iterable[tuple[Document, bytes]], folder: Path, heldout: float) -> Corpus:
    digest = hashlib.sha256()
    count, size = [0, 0], [0, 0]
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    with open(paths[0], "wb") as train_file, open(paths[1], "wb") as heldout_file:
        first = None
        for document, line in ordered:
            first = first or document.path
            # The first has the lowest hash: even of a few documents, at least that one is held out.
            part = int(document.path == first or is_heldout(document.path, heldout))
            (train_file, heldout_file)[part].write(line)
            digest.update(b"%d" % part + line)
            count[part] += 1
            size[part] += len(document.text.encode())
    (folder / "corpus.json").write_text(json.dumps({"digest": digest.hexdigest()}) + "\n")
    return Corpus(*paths, digest.hexdigest(), *count, *size)


def read_corpus(path: Path) -> Iterator[Document]:
    """The documents of a corpus file."""
    return map(_document, jsonl.read_objects(path))


def _document(row: dict[str, Any]) -> Document:
    return Document(str(row["path"]), str(row["text"]), row.get("prompt", ""), row.get("messages", ()))
