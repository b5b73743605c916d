"""The file in which rooms hand text to each other: JSON lines, {"path": ..., "text": ...} each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from registry.errors import BadInput


def rows(corpus: Path, keys: Sequence[str] = ("path", "text"), limit: int | None = None) -> Iterator[tuple[str, ...]]:
    """The values of `keys` in each line, in order; of the first `limit` lines where given.

    Raises BadInput for a file that cannot be read, and for a line without one of the keys, naming it.
    """
    try:
        with open(corpus, encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, limit), 1):
                try:
                    row = json.loads(line)
                    yield tuple(str(row[key]) for key in keys)
                except (ValueError, KeyError, TypeError):
                    raise BadInput(
                        f"{corpus}, line {number}: no JSON object with {' and '.join(f'a {key}' for key in keys)}",
                        fix='a corpus has one object a line: {"path": "...", "text": "..."}',
                    ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{corpus} cannot be read: {error}") from None
