"""`limbeck models history`: the alias moves of a model, and whether its ledger is consistent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import format_option, indent_lines, print_json, print_status, print_table

if TYPE_CHECKING:
    from limbeck.registry.ledger.chain import Ledger
    from limbeck.registry.records import LedgerEntry


@click.command()
@click.argument("name")
@click.option("--alias", help="Only the moves of this alias; problems are still those of all aliases.")
@click.option(
    "--verify", is_flag=True, help="Exit with 1 if an entry was changed, or an alias was moved through MLflow itself."
)
@click.option("--adopt", is_flag=True, help="Accept the problems as they are: recorded, and not reported again.")
@click.option("--reason", default="", help="With --adopt: why; recorded in the ledger.")
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
    ledger = audit.audit_ledger(store, name)
    entries = [entry for entry in ledger.entries if alias in (None, entry.alias)]
    if alias is not None and not entries and alias not in ledger.aliases:
        known = sorted({entry.alias for entry in ledger.entries} | ledger.aliases.keys())
        raise BadInput(f"{name} never had an alias {alias!r}", fix=f"it had {', '.join(known) or 'none'}")
    problems = ledger.problems()
    if output_format == "json":
        adopted = ledger.remaining_adopted_problems()
        fields = {"name": name, "aliases": ledger.aliases, "entries": entries}
        print_json(fields | {"problems": problems, "adopted": adopted})
    else:
        print_entries(name, entries)
    _print_notes(ledger, entries)
    if verify and problems:
        fix = f"to accept them as they are: limbeck models history {name} --adopt --reason ..."
        raise ledger.disagreement(problems, fix)
    if problems:
        print_status("\n".join(["problems:", *indent_lines(problems)]))
    elif verify:
        number = len(ledger.entries)
        print_status(f"{number} {'entry is' if number == 1 else 'entries are'} consistent")


def _print_notes(ledger: Ledger, entries: Iterable[LedgerEntry]) -> None:
    """Print overrides, unfinished moves and adopted problems to stderr."""
    report_overrides(entries)
    for alias in sorted({entry.alias for entry in ledger.entries}):
        unfinished = ledger.unfinished_move(alias)
        if unfinished and not ledger.external_move_problem(alias):
            print_status(f"entry {unfinished.sequence} is not carried out yet; the next promotion or rollback does it")
    adopted = ledger.remaining_adopted_problems()
    if adopted:
        print_status("\n".join(["adopted problems:", *indent_lines(adopted)]))


def report_overrides(entries: Iterable[LedgerEntry]) -> None:
    """Print the entries that moved an alias to a version that did not pass, with the failing rules, to stderr."""
    for entry in entries:
        if entry.override:
            target = f"{entry.alias} to {entry.name}/{entry.to_version}"
            text = f"OVERRIDE: in entry {entry.sequence} {entry.who} moved {target}, which did not pass:"
            print_status("\n".join([text, *indent_lines(entry.overridden_rules)]))


def print_entries(name: str, entries: Iterable[LedgerEntry]) -> None:
    """Print ledger entries as a table."""
    columns = ["entry", "when", "alias", "action", "from", "to", "who", "gate decision", "reason"]
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
