"""Text from outside in Markdown: escaped, so that it shows as written, on one line, and never becomes markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 300  # characters of one text
SPECIAL = re.compile(r"[\\`*{}\[\]<>|#&~$!^]|(?<![^\W_])_|_(?![^\W_])")


def one_line(value: Any, max_length: int = LONGEST) -> str:
    """A text on one line, with unprintable characters as escapes; a longer one is cut, with a note."""
    text = _escape_unprintable(re.sub(r"\s+", " ", str(value)).strip())
    return text if len(text) <= max_length else f"{text[:max_length]} ... (cut, {len(text):,} characters)"


def escape_inline(value: Any, max_length: int = LONGEST) -> str:
    """A text escaped for a line of Markdown or a table cell."""
    return SPECIAL.sub(r"\\\g<0>", one_line(value, max_length)).replace("://", ":\\//")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in GitHub's Markdown; None is shown as a dash. Empty if there are no rows."""
    lines = [[("-" if cell is None else escape_inline(cell)) or " " for cell in row] for row in rows]
    if not lines:
        return ""
    lines = [[escape_inline(column) for column in columns], ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code_block(lines: Iterable[str], language: str = "") -> str:
    """A block of code."""
    return f"```{language}\n" + "".join(f"{_escape_unprintable(line)}\n" for line in lines) + "```\n"


def _escape_unprintable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
