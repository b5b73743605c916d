"""`limbeck promote`, `rollback` and `protect`: an alias moves through the gate, and back; and whose policy holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from limbeck.registry.commands.history import print_entries, report_overrides
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import format_option, indent_lines, print_json, print_status, print_table

if TYPE_CHECKING:
    from limbeck.registry.gate.promotion import Candidate, Promotion
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.policy.schema import Policy

POLICY = Path("policy.toml")
adopt_option = click.option(
    "--adopt", is_flag=True, help="Go on where the alias was moved through MLflow itself; it goes into the ledger."
)


policy_option = click.option(
    "--policy",
    "path",
    type=click.Path(path_type=Path),
    help="A policy.  [default: the one that protects the alias, else ./policy.toml]",
)


def policy_for_alias(store: Store, name: str, alias: str, path: Path | None) -> Policy | None:
    """The policy that holds for an alias: the one that protects it, else that of `path` or ./policy.toml, else None."""
    from limbeck.registry.gate.protection import governing_policy, protecting_policy
    from limbeck.registry.policy.file import load_policy

    given = load_policy(path) if path else None
    if protecting_policy(store, name, alias) is not None:
        return governing_policy(store, name, alias, given)
    return given or (load_policy(POLICY) if POLICY.exists() else None)


@click.command()
@click.argument("model")
@click.option("--alias", default="production", show_default=True, help="The alias to move.")
@policy_option
@click.option("--reason", default="", help="Kept in the ledger.")
@click.option("--dry-run", is_flag=True, help="Judge, and write nothing.")
@click.option(
    "--override", is_flag=True, help="Move it though it does not pass, if the policy lets you; says so in the ledger."
)
@adopt_option
@format_option
def promote(
    model: str,
    alias: str,
    path: Path | None,
    reason: str,
    dry_run: bool,
    override: bool,
    adopt: bool,
    output_format: str,
) -> None:
    """Move an alias to a version that passes the policy.

    MODEL is NAME/VERSION or NAME@ALIAS; or NAME alone for the cheapest of its ONNX variants that pass. Exit
    code 1 where none does, with each rule and its numbers: then nothing moves. --override needs NAME/VERSION, a
    reason, and that the policy names you in [override] people.
    """
    from limbeck.registry.gate.promotion import Vetoed
    from limbeck.registry.gate.promotion import promote as run

    store = _store()
    name = store.get(model).name if "/" in model or "@" in model else model
    policy = policy_for_alias(store, name, alias, path)
    if policy is None:
        raise BadInput("no policy to judge by: there is no policy.toml here", fix="give one: --policy FILE")
    if override:
        _warn_unprotected(store, name, alias)
    try:
        done = run(store, model, alias, policy, reason=reason, dry_run=dry_run, adopt=adopt, override=override)
    except Vetoed as veto:
        if output_format == "json":
            print_json(_promotion_json(alias, veto.candidates))
        veto.fix = veto.fix or _override_hint(store, model, alias, policy)
        raise
    if output_format == "json":
        print_json(
            _promotion_json(alias, done.candidates)
            | {
                "chosen": done.chosen.ref,
                "from_version": done.previous_version,
                "moved": bool(done.entry),
                "entry": done.entry,
            }
        )
    else:
        _print_candidates(done.candidates)
    if done.previous_version == done.chosen.version:
        print_status(f"{done.name}@{alias} is {done.chosen.ref} already")
    else:
        was = f"{done.name}/{done.previous_version}" if done.previous_version is not None else "nothing"
        print_status(f"{done.name}@{alias} {'would be' if dry_run else 'is now'} {done.chosen.ref} (it was {was})")
        _report_override(done)


def _override_hint(store: Store, model: str, alias: str, policy: Policy) -> str | None:
    """The way past the gate, told only to those who may go it."""
    from limbeck.registry.gate.protection import can_override
    from limbeck.registry.mlflow import identity

    if "/" not in model and "@" not in model:
        return None
    version = store.get(model)
    if not can_override(policy, identity.current_user(store.tracking_uri), store, version.name):
        return None
    return f"you may all the same: limbeck promote {version.ref} --alias {alias} --override --reason ..."


def _warn_unprotected(store: Store, name: str, alias: str) -> None:
    """An override by a policy that anybody could have brought is worth little."""
    from limbeck.registry.gate.protection import protecting_policy

    if protecting_policy(store, name, alias) is None:
        print_status(
            f"warning: {name}@{alias} is not protected, so the policy that lets you override is one you brought\n"
            f"  limbeck protect {name} --alias {alias} --policy FILE"
        )


def _report_override(promotion: Promotion) -> None:
    chosen = next(candidate for candidate in promotion.candidates if candidate.version == promotion.chosen)
    if chosen.verdict.outcome != "pass":
        broken = [f"{rule.rule} ({rule.outcome}): {rule.message}" for rule in chosen.failing_rules]
        print_status("\n".join([f"OVERRIDE: {promotion.chosen.ref} does not pass the policy:", *indent_lines(broken)]))


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
                "usd_per_million_tokens": c.scorecard.cost.usd_per_million_tokens
                if c.scorecard and c.scorecard.cost
                else None,
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
            f"{c.usd_per_million_tokens:.4g}" if c.scorecard and c.scorecard.cost else None,
            c.verdict.outcome,
            "\n".join(f"{rule.rule}: {rule.message}" for rule in c.failing_rules) or None,
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
def rollback(name: str, alias: str, reason: str, adopt: bool, output_format: str) -> None:
    """Put an alias back on the version before; its files are verified first.

    Rolling back the first promotion takes the alias away.
    """
    from limbeck.registry.gate.promotion import rollback as run

    entry = run(_store(), name, alias, reason=reason, adopt=adopt)
    if output_format == "json":
        print_json(entry)
    else:
        print_entries(name, [entry])
    report_overrides([entry])
    now = f"is {name}/{entry.to_version} again" if entry.to_version is not None else "is taken away"
    print_status(f"{name}@{alias} {now} (it was {name}/{entry.from_version})")


@click.command()
@click.argument("name")
@click.option("--alias", default="production", show_default=True, help="The alias to protect.")
@click.option("--policy", "path", type=click.Path(path_type=Path), help="The policy that holds from now on.")
@click.option("--remove", is_flag=True, help="No policy holds any more.")
@click.option("--reason", default="", help="Kept in the ledger.")
@format_option
def protect(name: str, alias: str, path: Path | None, remove: bool, reason: str, output_format: str) -> None:
    """Let an alias of NAME move by one policy alone, whoever promotes; without --policy, show the one that holds.

    The policy is kept with the model. Only those in its [override] people, and who set it, may change or remove
    it; each change is an entry of the ledger.
    """
    from limbeck.registry.gate.protection import policy_settings, protecting_policy
    from limbeck.registry.gate.protection import protect as run
    from limbeck.registry.policy.file import load_policy

    store = _store()
    if path and remove:
        raise BadInput("--policy and --remove say opposite things", fix="give one of them")
    if path is None and not remove:
        policy = protecting_policy(store, name, alias)
        if output_format == "json":
            print_json({"alias": alias, "digest": policy and policy.digest(), "policy": policy})
        elif policy:
            print_table(
                f"{name}@{alias} is protected by {policy.digest()[:12]}", ["key", "value"], policy_settings(policy)
            )
        else:
            print_status(f"{name}@{alias} is not protected; give it a policy: --policy FILE")
        return
    entry = run(store, name, alias, load_policy(path) if path else None, reason=reason)
    if output_format == "json":
        print_json(entry)
    if entry is None:
        print_status(f"{name}@{alias} is protected by this policy already")
    else:
        held = f"is protected by {entry.policy[:12]} from now on" if entry.policy else "is not protected any more"
        print_status(f"{name}@{alias} {held}")


def _store() -> Store:
    from limbeck.registry.mlflow.store import Store

    return Store()
