"""`limbeck models history`: the alias moves of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.core.terminal import format_option, indent_lines, print_json, print_status, print_table

if TYPE_CHECKING:
    from limbeck.registry.ledger.chain import Ledger
    from limbeck.registry.records import LedgerEntry


@click.command()
@click.argument("name")
@click.option("--alias", help="The moves of this alias alone; what is wrong is told of all.")
@click.option("--verify", is_flag=True, help="Exit 1 where an entry was changed, or an alias moved behind our back.")
@click.option("--adopt", is_flag=True, help="Take what is wrong as it is: written as an entry, told no more.")
@click.option("--reason", default="", help="With --adopt: kept in the ledger.")
@format_option
def history(name: str, alias: str | None, verify: bool, adopt: bool, reason: str, output_format: str) -> None:
    """The alias moves of NAME, from its ledger."""
    from limbeck.registry.gate import audit
    from limbeck.registry.mlflow.store import Store

    if reason and not adopt:
        raise BadInput("--reason is for --adopt")
    store = Store()
    if adopt:
        audit.adopt_problems(store, name, reason=reason)
    book = audit.audit_ledger(store, name)
    entries = [entry for entry in book.entries if alias in (None, entry.alias)]
    if alias is not None and not entries and alias not in book.aliases:
        known = sorted({entry.alias for entry in book.entries} | book.aliases.keys())
        raise BadInput(f"{name} never had an alias {alias!r}", fix=f"it had {', '.join(known) or 'none'}")
    if output_format == "json":
        told = {"problems": book.problems(), "adopted": book.remaining_adopted_problems()}
        print_json({"name": name, "aliases": book.aliases, "entries": entries} | told)
    else:
        print_entries(name, entries)
    _print_notes(book, entries)
    problems = book.problems()
    if verify and problems:
        raise Refused(
            "\n".join([f"the ledger of {name} and its aliases do not agree:", *indent_lines(problems)]),
            fix=f"to take it as it is: limbeck models history {name} --adopt --reason ...",
        )
    if problems:
        print_status("\n".join(["not as it should be:", *indent_lines(problems)]))
    elif verify:
        print_status(f"{len(book.entries)} {'entry' if len(book.entries) == 1 else 'entries'}, each in its place")


def _print_notes(ledger_snapshot: Ledger, entries: Iterable[LedgerEntry]) -> None:
    """What a table of moves is too narrow for (stderr)."""
    report_overrides(entries)
    for alias in sorted({entry.alias for entry in ledger_snapshot.entries}):
        if (begun := ledger_snapshot.unfinished_move(alias)) and not ledger_snapshot.external_move_problem(alias):
            print_status(f"entry {begun.sequence} is not carried out yet; the next promotion or rollback does it")
    if settled := ledger_snapshot.remaining_adopted_problems():
        print_status("\n".join(["was not as it should be:", *indent_lines(settled)]))


def report_overrides(entries: Iterable[LedgerEntry]) -> None:
    """Say which entries are of a version that did not pass, and what it did not pass (stderr)."""
    for entry in entries:
        if entry.override:
            put = f"{entry.who} put {entry.alias} on {entry.name}/{entry.to_version}, which did not pass:"
            words = f"OVERRIDE: in entry {entry.sequence} {put}"
            print_status("\n".join([words, *indent_lines(entry.overridden_rules)]))


def print_entries(name: str, entries: Iterable[LedgerEntry]) -> None:
    """Print ledger entries as a table."""
    columns = ["entry", "when", "alias", "action", "from", "to", "who", "verdict", "reason"]
    rows = [
        (
            entry.sequence,
            f"{entry.when:%Y-%m-%d %H:%M:%S}",
            entry.alias,
            f"{entry.action} OVERRIDE" if entry.override else entry.action,
            entry.from_version,
            entry.to_version,
            entry.who,
            entry.verdict and entry.verdict[:12],
            entry.reason or None,
        )
        for entry in entries
    ]
    print_table(f"alias moves of {name}", columns, rows)
