"""The files in which rooms hand text to each other: JSON lines, {"path": ..., "text": ...} each.

A recipe's text is such a file for training and one held out, in `home()/data/NAME` beside `corpus.json`, which
holds the digest that versions name as their `data_digest`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home

KEYS = ("path", "text")


def read_objects(corpus: Path, keys: Sequence[str] = KEYS, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The object in each line, in order; of the first `limit` lines where given.

    Raises BadInput for a file that cannot be read, and for a line without one of the keys, naming it.
    """
    try:
        with open(corpus, encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, limit), 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict) or any(key not in row for key in keys):
                    raise BadInput(
                        f"{corpus}, line {number}: no JSON object with {' and '.join(f'a {key}' for key in keys)}",
                        fix='a corpus has one object a line: {"path": "...", "text": "..."}',
                    )
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{corpus} cannot be read: {error}") from None


def read_rows(corpus: Path, keys: Sequence[str] = KEYS, limit: int | None = None) -> Iterator[tuple[str, ...]]:
    """The values of `keys` in each line, as `objects`."""
    return (tuple(str(row[key]) for key in keys) for row in read_objects(corpus, keys, limit))


def corpus_digest_in(folder: Path) -> str | None:
    """The digest of the text in a folder; None where there is none that is whole."""
    try:
        return str(json.loads((folder / "corpus.json").read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_training_text(digest: str) -> Path | None:
    """The training text that a version's `data_digest` names, where it lies below `home()`; else None."""
    folders = sorted((home() / "data").glob("[!.]*"))
    return next((folder / "train.jsonl" for folder in folders if corpus_digest_in(folder) == digest), None)
