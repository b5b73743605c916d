"""Text files of JSON lines, {"path": ..., "text": ...} each: the form in which rooms hand text to each other.

`open_lines` opens all of them, so it is the place to read further formats, such as gzip.

The text of a recipe is two such files, `train.jsonl` and `heldout.jsonl`, in `home()/data/NAME`. Beside them
`corpus.json` holds the digest that versions name as their `data_digest`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home

KEYS = ("path", "text")


def open_lines(file: Path) -> TextIO:
    """Open a file of JSON lines for reading, as UTF-8. Raises OSError."""
    return open(file, encoding="utf-8")


def read_objects(corpus: Path, keys: Sequence[str] = KEYS, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The object in each line, in order; only of the first `limit` lines if given.

    Raises BadInput if the file cannot be read, or if a line lacks one of `keys`, with its number.
    """
    try:
        with open_lines(corpus) as lines:
            for number, line in enumerate(islice(lines, limit), 1):
                yield _parse_line(line, keys, f"{corpus}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{corpus} cannot be read: {error}") from None


def _parse_line(line: str, keys: Sequence[str], place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or any(key not in row for key in keys):
        raise BadInput(
            f"{place}: not a JSON object with {' and '.join(f'a {key}' for key in keys)}",
            fix='a corpus has one object in each line: {"path": "...", "text": "..."}',
        )
    return row


def read_rows(corpus: Path, keys: Sequence[str] = KEYS, limit: int | None = None) -> Iterator[tuple[str, ...]]:
    """The values of `keys` in each line, as strings; otherwise as `read_objects`."""
    return (tuple(str(row[key]) for key in keys) for row in read_objects(corpus, keys, limit))


def corpus_digest_in(folder: Path) -> str | None:
    """The digest of the text in a folder; None if `corpus.json` is missing or invalid."""
    try:
        return str(json.loads((folder / "corpus.json").read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_training_text(digest: str) -> Path | None:
    """The training text with the digest of a version's `data_digest`, if it is below `home()`; else None."""
    folders = sorted((home() / "data").glob("[!.]*"))
    return next((folder / "train.jsonl" for folder in folders if corpus_digest_in(folder) == digest), None)
