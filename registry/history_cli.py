"""`limbeck models history`: the alias moves of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from registry.errors import Refused
from registry.terminal import format_option, indented, print_json, print_table, say

if TYPE_CHECKING:
    from registry.records import LedgerEntry


@click.command()
@click.argument("name")
@click.option("--verify", is_flag=True, help="Exit 1 where an entry was changed, or an alias moved behind our back.")
@format_option
def history(name: str, verify: bool, output: str) -> None:
    """The alias moves of NAME, from its ledger."""
    from registry import ledger
    from registry.store import Store

    book = ledger.read(Store(), name)
    problems = book.problems()
    if output == "json":
        print_json({"name": name, "aliases": book.aliases, "entries": book.entries, "problems": problems})
    else:
        print_entries(name, book.entries)
    for alias in sorted({entry.alias for entry in book.entries}):
        if (entry := book.unfinished(alias)) and not book.moved(alias):
            say(f"entry {entry.sequence} is not carried out yet; the next promotion or rollback does it")
    if verify and problems:
        raise Refused("\n".join([f"the ledger of {name} and its aliases do not agree:", *indented(problems)]))
    if problems:
        say("\n".join(["not as it should be:", *indented(problems)]))
    elif verify:
        say(f"{len(book.entries)} entries, each in its place")


def print_entries(name: str, entries: Iterable[LedgerEntry]) -> None:
    """Print ledger entries as a table."""
    columns = ["entry", "when", "alias", "action", "from", "to", "who", "verdict", "reason"]
    rows = [
        (
            entry.sequence,
            f"{entry.when:%Y-%m-%d %H:%M:%S}",
            entry.alias,
            entry.action,
            entry.from_version,
            entry.to_version,
            entry.who,
            entry.verdict and entry.verdict[:12],
            entry.reason or None,
        )
        for entry in entries
    ]
    print_table(f"alias moves of {name}", columns, rows)
