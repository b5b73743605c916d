"""The data files of a task that lie on this machine: which they are, what is wrong with them, what row is where."""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from limbeck.evals.tasks.faults import Fault, Kind

JSON, CSV, TEXT, PARQUET = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), (".txt",), (".parquet",)
OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BLOCK = 2**20  # bytes read at a time


def data_files_of(config: Any) -> dict[str, list[Path]]:
    """Split -> its files on this machine, in the order of its rows. Files elsewhere are left out.

    Args:
        config: of the task. Its `dataset_path` is a format such as "json", or a folder; `data_files` and `data_dir`
            of its `dataset_kwargs` are those of `datasets.load_dataset`.
    """
    kwargs = getattr(config, "dataset_kwargs", None) or {}
    folder = Path(str(getattr(config, "dataset_path", None) or ""))
    base = Path(kwargs.get("data_dir") or (folder if folder.is_dir() else "."))
    named = kwargs.get("data_files") or {}
    by_split = named if isinstance(named, Mapping) else {"train": named}
    found = {}
    for split, names in by_split.items():
        several = [names] if isinstance(names, str) else list(names)
        local = [str(name) for name in several if "://" not in str(name)]
        found[str(split)] = [path for name in local for path in _expand(base / name)]
    return {split: paths for split, paths in found.items() if paths}


def _expand(path: Path) -> list[Path]:
    """The files of a pattern with wildcards; the path itself if it has none."""
    return sorted(map(Path, glob.glob(str(path), recursive=True))) if glob.has_magic(str(path)) else [path]


def file_faults(path: Path, task: str, *, encoding: str = "utf-8", parse: bool = False) -> Iterator[Fault]:
    """What is wrong with a data file: missing, empty, or not text; with `parse`, also lines that are not JSON objects.

    Args:
        parse: read each line of a JSON file; slow for a large one.
    """

    def fault(kind: Kind, detail: str, row: str | None = None) -> Fault:
        return Fault(kind=kind, detail=detail, task=task, file=str(path), row=row)

    if not path.is_file():
        yield fault("unreadable file", "it does not exist")
        return
    if path.stat().st_size == 0:
        yield fault("empty file", "it has no documents")
        return
    if _suffix(path) in PARQUET:
        yield from (fault(kind, detail) for kind, detail in _parquet_faults(path))
        return
    if _suffix(path) not in (*JSON, *CSV, *TEXT):
        return
    try:
        line = undecodable_line(path, encoding)
        if line is not None:
            yield fault("unreadable file", f"it is not {encoding.upper()} text", f"line {line}")
        elif _has_no_rows(path):
            yield fault("empty file", "it has no documents")
        elif parse and _suffix(path) in JSON:
            yield from (fault("unreadable file", detail, f"line {line}") for line, detail in _json_faults(path))
    except (OSError, EOFError, lzma.LZMAError) as error:
        yield fault("unreadable file", f"it cannot be read: {error}")


def _suffix(path: Path) -> str:
    """What the file's name ends with, without that of its compression."""
    return (path.with_suffix("") if path.suffix in OPENERS else path).suffix.lower()


def _open(path: Path) -> IO[bytes]:
    return OPENERS.get(path.suffix, lambda file: file.open("rb"))(path)  # type: ignore[no-any-return]


def undecodable_line(path: Path, encoding: str = "utf-8") -> int | None:
    """The first line, from 1, that is not text in this encoding, or that has a NUL; None if all is text."""
    decoder, lines = codecs.getincrementaldecoder(encoding)(), 0
    with _open(path) as file:
        while True:
            block = file.read(BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return lines + 1 + error.object[: error.start].count(b"\n")
            if "\0" in text:  # UTF-16 without a mark, or no text at all
                return lines + 1 + text[: text.index("\0")].count("\n")
            if not block:
                return None
            lines += text.count("\n")


def _has_no_rows(path: Path) -> bool:
    """Whether a text file has only blank lines, or no line after a CSV's header, or an empty JSON list."""
    header = int(_suffix(path) in CSV)
    with _open(path) as file:
        filled = (line.strip() for line in file if line.strip().removeprefix(codecs.BOM_UTF8))
        start = [line for line, _ in zip(filled, range(2), strict=False)]
    return len(start) <= header or b"".join(start) == b"[]"


def _parquet_faults(path: Path) -> Iterator[tuple[Kind, str]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        if parquet.read_metadata(path).num_rows == 0:
            yield "empty file", "it has no documents"
    except (pa.ArrowException, OSError) as error:
        yield "unreadable file", f"it cannot be read: {str(error).splitlines()[0]}"


def _json_faults(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of each line that is not a JSON object; none if the file as a whole is JSON."""
    lines = list(_json_lines(path))
    if not lines or _is_one_json(path):
        return
    for line, text in lines:
        try:
            found = json.loads(text)
        except ValueError as error:
            yield line, f"it is not JSON: {str(error)[:80]}"
            continue
        if not isinstance(found, dict):
            yield line, f"it is not a JSON object, but {text[:40].decode(errors='replace')!r}"


def _json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, text) of each line that is not blank."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
            if text:
                yield number, text


def _is_one_json(path: Path) -> bool:
    """Whether the file is one JSON value over several lines, or a list of objects."""
    with _open(path) as file:
        text = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) or (isinstance(found, list) and all(isinstance(row, dict) for row in found))


def rows_of(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(file, "line N" or "row N") of each row of a split, in order; ends at a file whose rows cannot be counted."""
    for path in paths:
        suffix = _suffix(path)
        if suffix in JSON:
            start = next(_json_lines(path), (0, b""))[1]
            if start.startswith(b"[") or not start.endswith(b"}"):  # a list, or one object over several lines
                with _open(path) as file:
                    found = json.loads(file.read().removeprefix(codecs.BOM_UTF8))
                yield from ((str(path), f"row {row}") for row, _ in enumerate(found, 1) if isinstance(found, list))
            else:
                yield from ((str(path), f"line {line}") for line, _ in _json_lines(path))
        elif suffix in CSV:
            yield from ((str(path), f"line {line}") for line in _csv_lines(path))
        elif suffix in TEXT:
            with _open(path) as file:
                yield from ((str(path), f"line {line}") for line, _ in enumerate(file, 1))
        elif suffix in PARQUET:
            import pyarrow.parquet as parquet

            yield from ((str(path), f"row {row + 1}") for row in range(parquet.read_metadata(path).num_rows))
        else:
            return


def _csv_lines(path: Path) -> Iterator[int]:
    """The line, from 1, on which each record after the header begins."""
    with _open(path) as file:
        reader = csv.reader((line.decode(errors="replace") for line in file), _Dialect)
        begin = 1
        for number, record in enumerate(reader):
            if record and number:
                yield begin
            begin = reader.line_num + 1


class _Dialect(csv.excel):
    """Only where a record ends counts, so the delimiter does not matter."""
