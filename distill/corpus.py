"""Where text comes from: documents of a recipe's `[data]`, split into train and held-out by a hash of their path."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill.recipe import TABLES, Data
from registry import corpusfile
from registry.digest import json_digest, text_digest
from registry.errors import BadInput
from registry.home import home, written_whole

# Tests, vendored copies and generated tables are no example of how library code is written.
LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip",
    "__pycache__", "pydoc_data", "turtledemo", "encodings", "_vendor", "config-3",
}  # fmt: skip


class Document(NamedTuple):
    """One text and the name that identifies it; the split and the statistics group by `path`."""

    path: str
    text: str


class Corpus(NamedTuple):
    """A recipe's text on disk: JSON lines of `{"path", "text"}`, and what identifies it."""

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
        if any(part in LEFT_OUT or part.startswith("config-") for part in parts):
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


def dataset_documents(data: Data, path: str) -> Iterator[Document]:
    """Rows of a table by their `text_column`."""
    rows = dataset_rows(data, path)
    if data.text_column not in rows.column_names:
        raise BadInput(
            f"{path} has no column {data.text_column!r}",
            fix=f"set data.text_column to one of: {', '.join(rows.column_names)}",
        )
    for number, row in enumerate(rows):
        text = row[data.text_column]
        if isinstance(text, str):
            yield Document(row_path(row, path, number), text)


def located(data: Data, beside: Path) -> str:
    """`data.path` as it is to be opened, looked for beside the recipe, then here; or a hub id. Raises BadInput."""
    path = Path(data.path or "").expanduser()
    found = next((p for p in (beside / path, path) if p.exists()), None)
    if found is None and (data.kind == "text" or path.suffix in TABLES):
        raise BadInput(f"data.path {data.path!r} does not exist", fix=f"looked in {beside} and in {Path.cwd()}")
    return str(found or data.path)


def documents(data: Data, beside: Path) -> Iterable[Document]:
    """The documents a recipe names."""
    if data.kind == "stdlib":
        return stdlib_documents()
    path = located(data, beside)
    return text_documents(Path(path)) if data.kind == "text" else dataset_documents(data, path)


def is_heldout(path: str, fraction: float) -> bool:
    """Whether a document is held out: decided by its path alone, so the split survives added documents."""
    return int(text_digest(path)[:12], 16) / 16**12 < fraction


def prepare(data: Data, beside: Path, name: str) -> Corpus:
    """A recipe's own text, written under `home()/data/<name>`. Raises BadInput where there is none."""
    return write(documents(data, beside), name, data.heldout, f"the text ({data.path or data.kind})")


def write(documents: Iterable[Document], name: str, heldout: float, what: str) -> Corpus:
    """Write train and held-out documents under `home()/data/<name>`, whole or not at all.

    Documents are ordered by the hash of their path, so that any prefix is a fair sample.

    Args:
        heldout: the share held out, by a hash of the path.
        what: the documents are, in words.

    Raises:
        BadInput: there is no text, or nothing would be held out.
    """
    folder = home() / "data" / name
    written = (document for document in documents if document.text.strip())
    ordered = sorted(written, key=lambda document: text_digest(document.path))
    parts: dict[str, list[Document]] = {"train": [], "heldout": []}
    for document in ordered:
        # The first is the likeliest to be held out: of a few documents at least that one is.
        out = document.path == ordered[0].path or is_heldout(document.path, heldout)
        parts["heldout" if out else "train"].append(document)
    for part, members in parts.items():
        if not members:
            raise BadInput(
                f"{what} leaves no {part} document: it has {len(ordered)} in all",
                fix=f"give more text, or another data.heldout than {heldout}",
            )
    digest = json_digest([[d.path, text_digest(d.text), p] for p, members in parts.items() for d in members])
    record = folder / "corpus.json"
    if not record.exists() or json.loads(record.read_text())["digest"] != digest:
        with written_whole(folder) as temporary:
            temporary.mkdir()
            for part, members in parts.items():
                lines = (json.dumps(d._asdict(), ensure_ascii=False) + "\n" for d in members)
                (temporary / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
            (temporary / "corpus.json").write_text(json.dumps({"digest": digest}) + "\n")
    size = {part: sum(len(d.text.encode()) for d in members) for part, members in parts.items()}
    return Corpus(
        folder / "train.jsonl",
        folder / "heldout.jsonl",
        digest,
        len(parts["train"]),
        len(parts["heldout"]),
        size["train"],
        size["heldout"],
    )


def read(path: Path) -> list[Document]:
    """The documents of a corpus file."""
    return [Document._make(row) for row in corpusfile.rows(path)]
