"""Where text comes from: documents of a recipe's `[data]`, split into train and held-out by a hash of their path."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from limbeck.distill.recipe.schema import TABLES, Data
from limbeck.registry.core import jsonl
from limbeck.registry.core.digest import text_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home

# Tests, vendored copies and generated tables are no example of how library code is written.
EXCLUDED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip",
    "__pycache__", "pydoc_data", "turtledemo", "encodings", "_vendor", "config-3",
}  # fmt: skip
ROLES = ("system", "user", "assistant")
MESSAGES = 'a message is {"role": "system", "user" or "assistant", "content": "..."}'


class Document(NamedTuple):
    """One text and the name that identifies it; the split and the statistics group by `path`.

    Attributes:
        text: all of it in plain: of a prompt with its completion both, of a conversation every turn.
        prompt: what `text` begins with and is not learnt; "" where all is.
        messages: the turns of a conversation, {"role", "content"} each; the assistant's are learnt.
    """

    path: str
    text: str
    prompt: str = ""
    messages: Sequence[dict[str, str]] = ()

    @property
    def completion(self) -> str:
        """What follows the prompt."""
        return self.text[len(self.prompt) :]


class Corpus(NamedTuple):
    """A recipe's text on disk: JSON lines of `Document`s, and what identifies it."""

    train: Path
    heldout: Path
    digest: str
    train_documents: int
    heldout_documents: int
    train_bytes: int
    heldout_bytes: int


def stdlib_documents() -> Iterator[Document]:
    """The source files of the running Python's standard library, paths relative to it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in EXCLUDED_FOLDERS or part.startswith("config-") for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield Document("/".join(parts), text)


def text_documents(path: Path, characters: int = 2000) -> Iterator[Document]:
    """Documents of a folder (its files), or of a text file: cut at the first blank line after `characters`,
    or at the end of any line after four times as many."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
            yield Document(file.relative_to(path).as_posix(), "".join(_lines(file)))
        return
    piece: list[str] = []
    size = number = 0
    for line in _lines(path):
        piece.append(line)
        size += len(line)
        if (size >= characters and not line.strip()) or size >= 4 * characters:
            yield Document(f"{path.name}:{number:05d}", "".join(piece))
            piece, size, number = [], 0, number + 1
    if piece:
        yield Document(f"{path.name}:{number:05d}", "".join(piece))


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text", fix="convert it, or leave it out of data.path") from None


def dataset_rows(data: Data, path: str) -> Any:
    """The rows of a JSON-lines, parquet or CSV file, or of a Hugging Face dataset, as a `datasets.Dataset`."""
    import datasets

    datasets.disable_progress_bars()
    loader = TABLES.get(Path(path).suffix)
    try:
        if loader:
            return datasets.load_dataset(loader, data_files=path, split="train", cache_dir=str(home() / "datasets"))
        return datasets.load_dataset(path, data.dataset_name, split=data.split)
    except Exception as error:  # datasets raises many kinds; each means: this data cannot be read
        raise BadInput(f"data.path {path!r} cannot be loaded: {error}") from error


def row_path(row: Mapping[str, Any], path: str, number: int) -> str:
    """What identifies a row: its own `path`, else its file's name and its number."""
    return str(row.get("path") or f"{Path(path).name}:{number:07d}")


def table_documents(data: Data, path: str) -> Iterator[tuple[Document, Mapping[str, Any]]]:
    """Rows of a table as the recipe reads them, and as they are.

    Raises BadInput, naming the row, for one that cannot be used.
    """
    rows = dataset_rows(data, path)
    for key in ("messages_column", "prompt_column", "completion_column", "text_column"):
        column = getattr(data, key)
        asked = key != "text_column" or not (data.messages_column or data.prompt_column)
        if column and asked and column not in rows.column_names:
            raise BadInput(
                f"{path} has no column {column!r}",
                fix=f"set data.{key} to one of: {', '.join(rows.column_names)}",
            )
    for number, row in enumerate(rows):
        try:
            document = document_of(data, row, row_path(row, path, number))
        except BadInput as error:
            error.message = f"{path}, row {number + 1}: {error.message}"
            raise
        if document:
            yield document, row


def document_of(data: Data, row: Mapping[str, Any], path: str) -> Document | None:
    """A row as a text, a prompt with its completion, or a conversation; None where its text is missing.

    Raises BadInput where a prompt, a completion or a turn is.
    """
    if data.messages_column:
        return conversation(path, _turns(row, data.messages_column))
    if data.prompt_column:
        prompt = _text_in_column(row, data.prompt_column)
        completion = _text_in_column(row, data.completion_column) if data.completion_column else ""
        return Document(path, prompt + completion, prompt=prompt)
    text = row[data.text_column]
    return Document(path, text) if isinstance(text, str) else None


def conversation(path: str, messages: Sequence[dict[str, str]]) -> Document:
    """A conversation as a document."""
    return Document(path, "\n".join(message["content"] for message in messages), messages=messages)


def _text_in_column(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, str) and value.strip():
        return value
    raise BadInput(f"{column} is {'no text' if isinstance(value, (dict, list)) else 'empty'}", fix="leave the row out")


def _turns(row: Mapping[str, Any], column: str) -> list[dict[str, str]]:
    """The messages of a row, checked; fields besides role and content are dropped."""
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        raise BadInput(f"{column} holds no messages", fix=MESSAGES)
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise BadInput(f"{column}, message {number} cannot be used: {str(turn)[:80]}", fix=MESSAGES)
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def locate_data(data: Data, recipe_folder: Path) -> str:
    """`data.path` as it is to be opened, looked for beside the recipe, then here; or a hub id. Raises BadInput."""
    path = Path(data.path or "").expanduser()
    found = next((p for p in (recipe_folder / path, path) if p.exists()), None)
    if found is None and (data.kind == "text" or path.suffix in TABLES):
        raise BadInput(f"data.path {data.path!r} does not exist", fix=f"looked in {recipe_folder} and in {Path.cwd()}")
    return str(found or data.path)


def documents(data: Data, recipe_folder: Path) -> Iterable[Document]:
    """The documents a recipe names."""
    if data.kind == "stdlib":
        return stdlib_documents()
    path = locate_data(data, recipe_folder)
    return (
        text_documents(Path(path)) if data.kind == "text" else (document for document, _ in table_documents(data, path))
    )


def is_heldout(path: str, fraction: float) -> bool:
    """Whether a document is held out: decided by its path alone, so the split survives added documents."""
    return int(text_digest(path)[:12], 16) / 16**12 < fraction


def prepare(data: Data, recipe_folder: Path, name: str) -> Corpus:
    """Write a recipe's text under `home()/data/<name>`. Raises BadInput where there is too little of it."""
    return write(documents(data, recipe_folder), name, data.heldout, f"the text ({data.path or data.kind})")


def write(documents: Iterable[Document], name: str, heldout: float, description: str) -> Corpus:
    """Write documents to `home()/data/<name>`, split in train and held-out, whole or not at all.

    Documents are ordered by the hash of their path, so that any prefix is a fair sample. They are not held in
    memory. Other text that lies there is kept as `<name>-<its digest>`, for versions that were made from it.

    Args:
        documents: those without text are left out.
        heldout: share of the documents.
        description: the text, for an error.

    Raises:
        BadInput: no text, or none for one of the two parts.
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
            raise BadInput(
                f"{description} leaves no {part} document of {text.train_documents + text.heldout_documents}",
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
    """Documents with their lines, by the hash of their path; `rows` holds them meanwhile."""
    places = []
    with open(rows, "w+b") as file:
        for document in documents:
            if document.text.strip():
                places.append((bytes.fromhex(text_digest(document.path)), file.tell()))
                said = {key: value for key, value in document._asdict().items() if value or key in jsonl.KEYS}
                file.write(json.dumps(said, ensure_ascii=False).encode() + b"\n")
        for _, place in sorted(places):
            file.seek(place)
            line = file.readline()
            yield _document(json.loads(line)), line


def _write_parts(ordered: Iterable[tuple[Document, bytes]], folder: Path, heldout: float) -> Corpus:
    digest = hashlib.sha256()
    count, size = [0, 0], [0, 0]
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    with open(paths[0], "wb") as train, open(paths[1], "wb") as held:
        first = None
        for document, line in ordered:
            first = first or document.path
            # The first is the likeliest to be held out: of a few documents at least that one is.
            part = int(document.path == first or is_heldout(document.path, heldout))
            (train, held)[part].write(line)
            digest.update(b"%d" % part + line)
            count[part] += 1
            size[part] += len(document.text.encode())
    (folder / "corpus.json").write_text(json.dumps({"digest": digest.hexdigest()}) + "\n")
    return Corpus(*paths, digest.hexdigest(), *count, *size)


def read(path: Path) -> Iterator[Document]:
    """The documents of a corpus file."""
    return map(_document, jsonl.read_objects(path))


def _document(row: dict[str, Any]) -> Document:
    return Document(str(row["path"]), str(row["text"]), row.get("prompt", ""), row.get("messages", ()))
