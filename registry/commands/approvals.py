"""`limbeck request`, `approve`, `reject` and `requests`: yes and no before an alias moves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from limbeck.registry.commands.gate import policy_for_alias, policy_option
from limbeck.registry.core.terminal import format_option, indent_lines, print_json, print_status, print_table

if TYPE_CHECKING:
    from limbeck.registry.gate.approvals import Answer, ApprovalState, OpenRequest
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.policy.schema import Policy
    from limbeck.registry.records import Verdict

alias_option = click.option("--alias", default="production", show_default=True, help="The alias that is asked for.")


@click.command()
@click.argument("ref")
@alias_option
@click.option("--reason", required=True, help="Why; kept with the version.")
@format_option
def request(ref: str, alias: str, reason: str, output_format: str) -> None:
    """Ask that an alias may point at the version REF.

    It is bound to the digest of the version's files. It ends where the alias is moved off the version again.
    """
    from limbeck.registry.gate import approvals

    made = approvals.request_approval(_store(), ref, alias, reason=reason)
    if output_format == "json":
        print_json(made)
    print_status(
        f"{made.who} asks for {made.name}/{made.version} at {alias}; to answer: limbeck approve {ref} --alias {alias}"
    )


@click.command()
@click.argument("ref")
@alias_option
@click.option("--reason", default="", help="Kept with the version.")
@policy_option
@click.option("--yes", is_flag=True, help="Ask nothing, on a terminal too.")
@format_option
def approve(ref: str, alias: str, reason: str, path: Path | None, yes: bool, output_format: str) -> None:
    """Say yes to the newest request for the version REF, with the verdict of now before you.

    The author of the version and who asked cannot. It is signed where LIMBECK_SIGNING_KEY names a key.
    """
    _answer_request(ref, alias, "approve", reason, path, yes, output_format)


@click.command()
@click.argument("ref")
@alias_option
@click.option("--reason", required=True, help="Why; kept with the version.")
@policy_option
@click.option("--yes", is_flag=True, help="Ask nothing, on a terminal too.")
@format_option
def reject(ref: str, alias: str, reason: str, path: Path | None, yes: bool, output_format: str) -> None:
    """Say no to the newest request for the version REF; your newest answer counts."""
    _answer_request(ref, alias, "reject", reason, path, yes, output_format)


def _answer_request(
    ref: str, alias: str, answer: Answer, reason: str, path: Path | None, yes: bool, output_format: str
) -> None:
    from limbeck.registry.gate import approvals
    from limbeck.registry.gate.evidence import gather_evidence
    from limbeck.registry.gate.rules.apply_policy import apply_policy

    store = _store()
    version = store.get(ref)
    asked = approvals.load_approval_state(store, version, alias)
    shown = approvals.request_to_answer(store, asked, alias).digest()
    policy = policy_for_alias(store, version.name, alias, path)
    verdict = apply_policy(policy, gather_evidence(store, version, policy, alias)) if policy else None
    if output_format == "table":
        _print_request(asked, policy, verdict)
    if not yes and sys.stdin.isatty():
        click.confirm(f"{answer} {version.ref} for {alias}?", abort=True, err=True)
    made = approvals.answer_request(
        store, version.ref, alias, answer, reason=reason, verdict=verdict, expected_request=shown
    )
    if output_format == "json":
        print_json({"approval": made, "verdict": verdict})
    signed = "signed" if made.signature else "not signed"
    print_status(f"{made.who} {answer}s {version.ref} for {alias} ({signed})")


def _print_request(state: ApprovalState, policy: Policy | None, verdict: Verdict | None) -> None:
    """What somebody has to see before they answer."""
    from limbeck.registry.gate.protection import policy_settings as rules

    if state.request:
        fields = state.request.model_dump(include={"alias", "who", "when", "reason", "artifact"})
        print_table(f"asked for {state.version.ref}", ["field", "value"], fields.items())
    if answers := [*state.earlier_answers, *state.answers]:
        said = [(a.answer, a.who, f"{a.when:%Y-%m-%d %H:%M}", a.reason or None) for a in answers]
        print_table("answers so far", ["answer", "who", "when", "reason"], said)
    if policy and verdict:
        print_table(f"the policy {policy.digest()[:12]}", ["key", "value"], rules(policy))
        rows = [(rule.rule, rule.outcome, rule.message) for rule in verdict.rules]
        print_table(f"verdict as of now: {verdict.outcome}", ["rule", "outcome", "numbers"], rows)
    else:
        print_status("no policy: there is no verdict to look at")
    _report_problems(state)


@click.command()
@click.argument("name", required=False)
@format_option
def requests(name: str | None, output_format: str) -> None:
    """The requests that wait for an answer or for their promotion, of NAME or of all models."""
    from limbeck.registry.gate import approvals

    found = approvals.open_requests(_store(), name)
    if output_format == "json":
        print_json([_request_json(each) for each in found])
        return
    if not found:
        print_status("nothing waits")
        return
    columns = ["version", "alias", "asked by", "when", "reason", "approved by", "needed", "may still answer"]
    print_table("requests", columns, [_row(each) for each in found])
    for each in found:
        _report_problems(each.state)


def _row(each: OpenRequest) -> tuple[Any, ...]:
    return (
        each.state.version.ref,
        each.request.alias,
        each.request.who,
        f"{each.request.when:%Y-%m-%d %H:%M}",
        each.request.reason,
        ", ".join(each.approved_by) or None,
        each.needed,
        ", ".join(each.eligible_approvers) or None,
    )


def _request_json(each: OpenRequest) -> dict[str, Any]:
    return each.request.model_dump(mode="json") | {
        "request": each.request.digest(),
        "answers": each.state.answers,
        "approved_by": each.approved_by,
        "needed": each.needed,
        "eligible_approvers": each.eligible_approvers,
        "problems": each.state.problems,
    }


def _report_problems(state: ApprovalState) -> None:
    if state.problems:
        print_status("\n".join([f"not as it should be, of {state.version.ref}:", *indent_lines(state.problems)]))


def _store() -> Store:
    from limbeck.registry.mlflow.store import Store

    return Store()
