"""`limbeck policy check`: what a policy requires, and what the gate would decide on a version."""

from __future__ import annotations

from pathlib import Path

import click

from limbeck.registry.core.errors import Refused
from limbeck.registry.core.terminal import format_option, print_json, print_status, print_table


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", "ref", metavar="NAME/VERSION", help="Apply the policy to this version; writes nothing.")
@click.option("--alias", default="production", show_default=True, help="The alias that would point at the version.")
@format_option
def check(file: Path, ref: str | None, alias: str, output_format: str) -> None:
    """Describe what the policy FILE requires, or report its mistakes with their lines.

    Exit code 2 if the policy is invalid, has no rule, or no model can pass it; with --model, 1 if the version does not
    pass.
    """
    from limbeck.registry.policy.describe import describe_policy
    from limbeck.registry.policy.file import load_policy

    policy = load_policy(file)
    rules = list(describe_policy(policy))
    if ref is None:
        if output_format == "json":
            print_json({"policy": policy.digest(), "rules": dict(rules), "verdict": None})
        else:
            print_table(str(file), ["rule", "requires"], rules)
        print_status(f"the policy {policy.digest()[:12]} is valid")
        return

    from limbeck.registry.gate.evidence import gather_evidence
    from limbeck.registry.gate.rules.apply_policy import apply_policy
    from limbeck.registry.mlflow.store import Store

    store = Store()
    version = store.get(ref)
    verdict = apply_policy(policy, gather_evidence(store, version, policy, alias))
    if output_format == "json":
        print_json({"policy": policy.digest(), "rules": dict(rules), "verdict": verdict})
    else:
        rows = [(each.rule, each.outcome, each.message) for each in verdict.rules]
        print_table(f"gate decision on {version.ref} by {file}", ["rule", "outcome", "numbers"], rows)
    if verdict.outcome != "pass":
        raise Refused(f"{version.ref} does not pass: {verdict.outcome}")
    print_status(f"{version.ref} passes")
