"""`limbeck promote`, `rollback` and `protect`: move an alias through the gate, move it back, and set its policy."""

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

DEFAULT_POLICY_FILE = Path("policy.toml")
adopt_option = click.option(
    "--adopt",
    is_flag=True,
    help="Accept the alias as it is if it was moved through MLflow itself; the ledger records that.",
)


policy_option = click.option(
    "--policy",
    "path",
    type=click.Path(path_type=Path),
    help="A policy file.  [default: the policy that protects the alias, else ./policy.toml]",
)


def policy_for_alias(store: Store, name: str, alias: str, path: Path | None) -> Policy | None:
    """The policy of an alias: the one that protects it, else that of `path` or ./policy.toml, else None."""
    from limbeck.registry.gate.protection import governing_policy, protecting_policy
    from limbeck.registry.policy.file import load_policy

    given = load_policy(path) if path else None
    if protecting_policy(store, name, alias) is not None:
        return governing_policy(store, name, alias, given)
    if given is None and DEFAULT_POLICY_FILE.exists():
        return load_policy(DEFAULT_POLICY_FILE)
    return given


@click.command()
@click.argument("model")
@click.option("--alias", default="production", show_default=True, help="The alias to move.")
@policy_option
@click.option("--reason", default="", help="Why; recorded in the ledger.")
@click.option("--dry-run", is_flag=True, help="Print the gate decision, and write nothing.")
@click.option(
    "--override", is_flag=True, help="Move to a version that does not pass, if the policy allows you to; recorded."
)
@adopt_option
@format_option
def promote(  # noqa: PLR0913 (one parameter per option)
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

    MODEL is NAME/VERSION or NAME@ALIAS; or NAME alone for the cheapest of its ONNX variants that passes; other
    versions are skipped, with the reason. If no version passes, the exit code is 1, the failing rules are printed with
    their numbers, and the alias stays. --override needs NAME/VERSION, a reason, and a policy that names you in
    [override] people.
    """
    from limbeck.registry.gate.promotion import PromotionOptions, Vetoed, skipped_versions
    from limbeck.registry.gate.promotion import promote as run

    store = _store()
    name = store.get(model).name if "/" in model or "@" in model else model
    policy = policy_for_alias(store, name, alias, path)
    if policy is None:
        raise BadInput("there is no policy: no policy.toml in this folder", fix="give one: --policy FILE")
    if override:
        _warn_unprotected(store, name, alias)
    options = PromotionOptions(dry_run=dry_run, adopt=adopt, override=override)
    skipped = skipped_versions(store, model)
    try:
        promotion = run(store, model, alias, policy, reason=reason, options=options)
    except Vetoed as veto:
        _report_skipped(skipped)
        if output_format == "json":
            print_json(_promotion_json(alias, veto.candidates, skipped))
        veto.fix = veto.fix or _override_hint(store, model, alias, policy)
        raise
    if output_format == "json":
        print_json(_promotion_json(alias, promotion.candidates, skipped, promotion))
    else:
        _report_skipped(skipped)
        _print_candidates(promotion.candidates)
    _report_move(promotion, dry_run)


def _report_move(promotion: Promotion, dry_run: bool) -> None:
    target = f"{promotion.name}@{promotion.alias}"
    if promotion.previous_version == promotion.chosen.version:
        print_status(f"{target} is {promotion.chosen.ref} already")
        return
    previous = "nothing"
    if promotion.previous_version is not None:
        previous = f"{promotion.name}/{promotion.previous_version}"
    print_status(f"{target} {'would be' if dry_run else 'is now'} {promotion.chosen.ref} (it was {previous})")
    chosen = next(candidate for candidate in promotion.candidates if candidate.version == promotion.chosen)
    if chosen.verdict.outcome != "pass":
        failing = indent_lines(chosen.describe_failing_rules())
        print_status("\n".join([f"OVERRIDE: {promotion.chosen.ref} does not pass the policy:", *failing]))


def _override_hint(store: Store, model: str, alias: str, policy: Policy) -> str | None:
    """The command that overrides the gate, for people who may use it; else None."""
    from limbeck.registry.gate.protection import can_override
    from limbeck.registry.mlflow import identity

    if "/" not in model and "@" not in model:
        return None
    version = store.get(model)
    if not can_override(policy, identity.current_user(store.tracking_uri), store, version.name):
        return None
    return f"you may override it: limbeck promote {version.ref} --alias {alias} --override --reason ..."


def _warn_unprotected(store: Store, name: str, alias: str) -> None:
    """Warn that anybody could bring a policy that allows an override."""
    from limbeck.registry.gate.protection import protecting_policy

    if protecting_policy(store, name, alias) is None:
        print_status(
            f"warning: {name}@{alias} is not protected, so the policy that lets you override is your own\n"
            f"  limbeck protect {name} --alias {alias} --policy FILE"
        )


def _report_skipped(skipped: dict[str, str]) -> None:
    """Print a line for each reason why versions are no candidates."""
    reasons = dict.fromkeys(skipped.values())
    for reason in reasons:
        print_status(f"skipped {', '.join(ref for ref, why in skipped.items() if why == reason)}: {reason}")


def _promotion_json(
    alias: str, candidates: list[Candidate], skipped: dict[str, str], promotion: Promotion | None = None
) -> dict[str, Any]:
    """`promotion` is None if no candidate passes."""
    return {
        "alias": alias,
        "chosen": promotion.chosen.ref if promotion else None,
        "from_version": promotion.previous_version if promotion else None,
        "moved": bool(promotion and promotion.entry),
        "entry": promotion.entry if promotion else None,
        "candidates": [
            {"version": each.version.ref, "usd_per_million_tokens": _usd(each), "verdict": each.verdict}
            for each in candidates
        ],
        "skipped": skipped,
    }


def _usd(candidate: Candidate) -> float | None:
    """Dollars per million tokens; None if it was not measured."""
    cost = candidate.scorecard.cost if candidate.scorecard else None
    return cost.usd_per_million_tokens if cost else None


def _print_candidates(candidates: list[Candidate]) -> None:
    rows = []
    for each in candidates:
        usd = _usd(each)
        rows.append(
            (
                each.version.ref,
                each.version.recipe,
                each.version.precision,
                None if usd is None else f"{usd:.4g}",
                each.verdict.outcome,
                "\n".join(f"{rule.rule}: {rule.message}" for rule in each.failing_rules) or None,
            )
        )
    columns = ["version", "recipe", "precision", "usd per million tokens", "gate decision", "rules that do not pass"]
    print_table("candidates, cheapest first", columns, rows)


@click.command()
@click.argument("name")
@click.option("--alias", default="production", show_default=True, help="The alias to move.")
@click.option("--reason", default="", help="Why; recorded in the ledger.")
@adopt_option
@format_option
def rollback(name: str, alias: str, reason: str, adopt: bool, output_format: str) -> None:
    """Move an alias back to its previous version, after verifying that version's files.

    Rolling back the first promotion removes the alias.
    """
    from limbeck.registry.gate.promotion import rollback as run

    entry = run(_store(), name, alias, reason=reason, adopt=adopt)
    if output_format == "json":
        print_json(entry)
    else:
        print_entries(name, [entry])
    report_overrides([entry])
    now = f"is {name}/{entry.to_version} again" if entry.to_version is not None else "is removed"
    print_status(f"{name}@{alias} {now} (it was {name}/{entry.from_version})")


@click.command()
@click.argument("name")
@click.option("--alias", default="production", show_default=True, help="The alias to protect.")
@click.option("--policy", "path", type=click.Path(path_type=Path), help="The policy that applies from now on.")
@click.option("--remove", is_flag=True, help="Remove the protection.")
@click.option("--reason", default="", help="Why; recorded in the ledger.")
@format_option
def protect(name: str, alias: str, path: Path | None, remove: bool, reason: str, output_format: str) -> None:
    """Protect an alias of NAME: it moves only by this policy, whoever promotes. Without --policy, print its policy.

    The policy is stored with the model. Only the people in its [override], and whoever set it, may change or remove
    it; the ledger records each change.
    """
    from limbeck.registry.gate.protection import protect as run
    from limbeck.registry.policy.file import load_policy

    store = _store()
    if path and remove:
        raise BadInput("--policy and --remove exclude each other", fix="give one of them")
    if path is None and not remove:
        _print_protecting_policy(store, name, alias, output_format)
        return
    entry = run(store, name, alias, load_policy(path) if path else None, reason=reason)
    if output_format == "json":
        print_json(entry)
    if entry is None:
        print_status(f"{name}@{alias} is protected by this policy already")
    elif entry.policy:
        print_status(f"{name}@{alias} is protected by {entry.policy[:12]} from now on")
    else:
        print_status(f"{name}@{alias} is not protected any more")


def _print_protecting_policy(store: Store, name: str, alias: str, output_format: str) -> None:
    from limbeck.registry.gate.protection import policy_settings, protecting_policy

    policy = protecting_policy(store, name, alias)
    if output_format == "json":
        print_json({"alias": alias, "digest": policy and policy.digest(), "policy": policy})
    elif policy:
        title = f"{name}@{alias} is protected by {policy.digest()[:12]}"
        print_table(title, ["key", "value"], policy_settings(policy))
    else:
        print_status(f"{name}@{alias} is not protected; give it a policy: --policy FILE")


def _store() -> Store:
    from limbeck.registry.mlflow.store import Store

    return Store()
