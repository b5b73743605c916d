"""`limbeck promote` and `rollback`: an alias moves through the gate, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.errors import BadInput
from registry.history_cli import print_entries
from registry.terminal import format_option, print_json, print_table, say

if TYPE_CHECKING:
    from registry.promotion import Candidate
    from registry.store import Store

POLICY = Path("policy.toml")
adopt_option = click.option(
    "--adopt", is_flag=True, help="Go on where the alias was moved through MLflow itself; it goes into the ledger."
)


@click.command()
@click.argument("model")
@click.option("--to", "alias", default="production", show_default=True, help="The alias to move.")
@click.option("--policy", "path", type=click.Path(path_type=Path), help="A policy.  [default: ./policy.toml]")
@click.option("--reason", default="", help="Kept in the ledger.")
@click.option("--dry-run", is_flag=True, help="Judge, and write nothing.")
@adopt_option
@format_option
def promote(model: str, alias: str, path: Path | None, reason: str, dry_run: bool, adopt: bool, output: str) -> None:
    """Move an alias to a version that passes the policy.

    MODEL is NAME/VERSION or NAME@ALIAS; or NAME alone for the cheapest of its ONNX variants that pass. Exit
    code 1 where none does, with each rule and its numbers: then nothing moves.
    """
    from registry.policy import load
    from registry.promotion import Vetoed
    from registry.promotion import promote as run

    if path is None and not POLICY.exists():
        raise BadInput("no policy to judge by: there is no policy.toml here", fix="give one: --policy FILE")
    policy = load(path or POLICY)
    try:
        done = run(_store(), model, alias, policy, reason=reason, dry_run=dry_run, adopt=adopt)
    except Vetoed as veto:
        if output == "json":
            print_json(_promotion_json(alias, veto.candidates))
        raise
    if output == "json":
        print_json(
            _promotion_json(alias, done.candidates)
            | {"chosen": done.chosen.ref, "from_version": done.before, "moved": bool(done.entry), "entry": done.entry}
        )
    else:
        _print_candidates(done.candidates)
    if done.before == done.chosen.version:
        say(f"{done.name}@{alias} is {done.chosen.ref} already")
    else:
        was = f"{done.name}/{done.before}" if done.before is not None else "nothing"
        say(f"{done.name}@{alias} {'would be' if dry_run else 'is now'} {done.chosen.ref} (it was {was})")


def _promotion_json(alias: str, candidates: list[Candidate]) -> dict[str, Any]:
    return {
        "alias": alias,
        "chosen": None,
        "from_version": None,
        "moved": False,
        "entry": None,
        "candidates": [
            {
                "version": c.version.ref,
                "usd_per_million_tokens": c.card.cost.usd_per_million_tokens if c.card and c.card.cost else None,
                "verdict": c.verdict,
            }
            for c in candidates
        ],
    }


def _print_candidates(candidates: list[Candidate]) -> None:
    rows = [
        (
            c.version.ref,
            c.version.recipe,
            c.version.precision,
            f"{c.price:.4g}" if c.card and c.card.cost else None,
            c.verdict.outcome,
            "\n".join(f"{rule.rule}: {rule.message}" for rule in c.failing) or None,
        )
        for c in candidates
    ]
    columns = ["version", "recipe", "precision", "usd per million tokens", "verdict", "what does not pass"]
    print_table("candidates, cheapest first", columns, rows)


@click.command()
@click.argument("name")
@click.option("--alias", default="production", show_default=True, help="The alias to move.")
@click.option("--reason", default="", help="Kept in the ledger.")
@adopt_option
@format_option
def rollback(name: str, alias: str, reason: str, adopt: bool, output: str) -> None:
    """Put an alias back on the version before; its files are verified first.

    Rolling back the first promotion takes the alias away.
    """
    from registry.promotion import rollback as run

    entry = run(_store(), name, alias, reason=reason, adopt=adopt)
    if output == "json":
        print_json(entry)
    else:
        print_entries(name, [entry])
    now = f"is {name}/{entry.to_version} again" if entry.to_version is not None else "is taken away"
    say(f"{name}@{alias} {now} (it was {name}/{entry.from_version})")


def _store() -> Store:
    from registry.store import Store

    return Store()
