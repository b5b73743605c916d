"""Output of all commands: tables, JSON, status lines and progress bars. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from limbeck.registry.core.errors import BadInput, escape_unprintable
from limbeck.registry.core.home import atomic_write

MANY = 100  # rows; a longer table is printed without rich
LONGEST = 5000  # characters of a cell

format_option = click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A table for people or JSON for programs.",
)


def print_status(text: str) -> None:
    """Print what the command is doing, on stderr, so that stdout stays machine-readable."""
    print(escape_unprintable(text), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print JSON on stdout; pydantic records by their fields."""
    print(json.dumps(value, indent=2, default=_plain))


def write_report(text: str, file: Path | None) -> None:
    """Write a report to `file` and print its path; without `file`, print the report. Raises BadInput."""
    if file is None:
        print(text, end="")
        return
    try:
        with atomic_write(file) as part:
            part.write_text(text, encoding="utf-8")
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise BadInput(f"{file} cannot be written: {error.strerror}", fix="choose another --output") from error
    print(os.path.relpath(file))


def format_bytes(count: float) -> str:
    """A number of bytes for people: `38.9 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on stdout. None is shown as a dash; cells are not interpreted as markup."""
    from rich.console import Console
    from rich.table import Table

    title, names = _cell(title), list(map(_cell, columns))
    cells = [["-" if cell is None else _cell(cell) for cell in row] for row in rows]
    if len(cells) > MANY:
        _print_many(title, names, cells)
        return
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for name in names:
        table.add_column(name)
    for row in cells:
        table.add_row(*row)
    console = Console()
    # A pipe has no width: print whole cells rather than cut them at 80 columns.
    width = console.width if console.is_terminal else 200
    Console(width=width, markup=False, emoji=False).print(table)


def _print_many(title: str, columns: list[str], cells: list[list[str]]) -> None:
    """Print the same table without rich, which takes about 60 microseconds for each cell; lines are not wrapped."""
    from rich.cells import cell_len

    rows = [[cell.replace("\n", " ") for cell in row] for row in [columns, *cells]]
    widths = [max(len(c) if c.isascii() else cell_len(c) for c in column) for column in zip(*rows, strict=True)]

    def line(row: list[str], left: str, between: str, right: str) -> str:
        padded = (
            c + " " * (width - (len(c) if c.isascii() else cell_len(c))) for c, width in zip(row, widths, strict=True)
        )
        return f"{left} {f' {between} '.join(padded)} {right}"

    def rule(left: str, dash: str, between: str, right: str) -> str:
        return left + between.join(dash * (width + 2) for width in widths) + right

    lines = [title] if title else []
    lines += [rule("┏", "━", "┳", "┓"), line(rows[0], "┃", "┃", "┃"), rule("┡", "━", "╇", "┩")]
    lines += [line(row, "│", "│", "│") for row in rows[1:]]
    print("\n".join([*lines, rule("└", "─", "┴", "┘")]))


def _cell(value: Any) -> str:
    """A value as a table shows it; a longer one is cut, with a note."""
    text = str(value)
    return escape_unprintable(text if len(text) <= LONGEST else f"{text[:LONGEST]} ... (cut, {len(text):,} characters)")


def progress_bar() -> Any:
    """A rich progress bar with rate and time left, on stderr; it disappears when done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # else a log file gets an empty line for each bar
    )


def quiet_libraries() -> None:
    """Silence the warnings and logs of libraries; call it before importing them."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("torch", "optimum", "lm_eval", "lm-eval", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def indent_lines(lines: Iterable[str]) -> list[str]:
    """Lines indented below the line they belong to."""
    return [f"  {line}" for line in lines]
