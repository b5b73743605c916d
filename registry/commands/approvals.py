"""`limbeck request`, `approve`, `reject` and `requests`: approvals before an alias moves."""

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

alias_option = click.option("--alias", default="production", show_default=True, help="The alias of the request.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation on a terminal.")


@click.command()
@click.argument("ref")
@alias_option
@click.option("--reason", required=True, help="Why; stored with the version.")
@format_option
def request(ref: str, alias: str, reason: str, output_format: str) -> None:
    """Request that an alias may point at the version REF.

    The request is bound to the digest of the version's files. It ends when the alias moves off the version again.
    """
    from limbeck.registry.gate import approvals

    made = approvals.request_approval(_store(), ref, alias, reason=reason)
    if output_format == "json":
        print_json(made)
    answer = f"limbeck approve {ref} --alias {alias}"
    print_status(f"{made.who} requests that {alias} may point at {made.name}/{made.version}; to answer: {answer}")


@click.command()
@click.argument("ref")
@alias_option
@click.option("--reason", default="", help="Why; stored with the version.")
@policy_option
@yes_option
@format_option
def approve(ref: str, alias: str, reason: str, path: Path | None, yes: bool, output_format: str) -> None:
    """Approve the newest request for the version REF, after printing the gate decision as of now.

    The author of the version and whoever made the request cannot approve it. The approval is signed if
    LIMBECK_SIGNING_KEY names a key.
    """
    _answer_request(ref, alias, "approve", reason, path, yes, output_format)


@click.command()
@click.argument("ref")
@alias_option
@click.option("--reason", required=True, help="Why; stored with the version.")
@policy_option
@yes_option
@format_option
def reject(ref: str, alias: str, reason: str, path: Path | None, yes: bool, output_format: str) -> None:
    """Reject the newest request for the version REF. Your newest answer counts."""
    _answer_request(ref, alias, "reject", reason, path, yes, output_format)


def _answer_request(
    ref: str, alias: str, answer: Answer, reason: str, path: Path | None, yes: bool, output_format: str
) -> None:
    from limbeck.registry.gate import approvals
    from limbeck.registry.gate.evidence import gather_evidence
    from limbeck.registry.gate.rules.apply_policy import apply_policy

    store = _store()
    version = store.get(ref)
    state = approvals.load_approval_state(store, version, alias)
    newest = approvals.request_to_answer(store, state, alias)
    policy = policy_for_alias(store, version.name, alias, path)
    verdict = apply_policy(policy, gather_evidence(store, version, policy, alias)) if policy else None
    if output_format == "table":
        _print_request(state, policy, verdict)
    if not yes and sys.stdin.isatty():
        click.confirm(f"{answer} {version.ref} for {alias}?", abort=True, err=True)
    shown = approvals.ShownToApprover(verdict, newest.digest())
    approval = approvals.answer_request(store, version.ref, alias, answer, reason=reason, shown=shown)
    if output_format == "json":
        print_json({"approval": approval, "verdict": verdict})
    signed = "signed" if approval.signature else "not signed"
    print_status(f"{approval.who} {answer}s {version.ref} for {alias} ({signed})")


def _print_request(state: ApprovalState, policy: Policy | None, verdict: Verdict | None) -> None:
    """Print what a person has to see before they answer."""
    from limbeck.registry.gate.protection import policy_settings

    if state.request:
        fields = state.request.model_dump(include={"alias", "who", "when", "reason", "artifact"})
        print_table(f"request for {state.version.ref}", ["field", "value"], fields.items())
    answers = [*state.earlier_answers, *state.answers]
    if answers:
        rows = [(a.answer, a.who, f"{a.when:%Y-%m-%d %H:%M}", a.reason or None) for a in answers]
        print_table("answers so far", ["answer", "who", "when", "reason"], rows)
    if policy and verdict:
        print_table(f"the policy {policy.digest()[:12]}", ["key", "value"], policy_settings(policy))
        rules = [(rule.rule, rule.outcome, rule.message) for rule in verdict.rules]
        print_table(f"gate decision as of now: {verdict.outcome}", ["rule", "outcome", "numbers"], rules)
    else:
        print_status("there is no policy, so there is no gate decision to show")
    _report_problems(state)


@click.command()
@click.argument("name", required=False)
@format_option
def requests(name: str | None, output_format: str) -> None:
    """List the requests that wait for an answer or for their promotion, of NAME or of all models."""
    from limbeck.registry.gate import approvals

    found = approvals.open_requests(_store(), name)
    if output_format == "json":
        print_json([_request_json(each) for each in found])
        return
    if not found:
        print_status("no open requests")
        return
    columns = ["version", "alias", "requested by", "when", "reason", "approved by", "needed", "may still answer"]
    print_table("requests", columns, [_row(each) for each in found])
    for each in found:
        _report_problems(each.state)


def _row(open_request: OpenRequest) -> tuple[Any, ...]:
    request = open_request.request
    return (
        open_request.state.version.ref,
        request.alias,
        request.who,
        f"{request.when:%Y-%m-%d %H:%M}",
        request.reason,
        ", ".join(open_request.approved_by) or None,
        open_request.needed,
        ", ".join(open_request.eligible_approvers) or None,
    )


def _request_json(open_request: OpenRequest) -> dict[str, Any]:
    return open_request.request.model_dump(mode="json") | {
        "request": open_request.request.digest(),
        "answers": open_request.state.answers,
        "approved_by": open_request.approved_by,
        "needed": open_request.needed,
        "eligible_approvers": open_request.eligible_approvers,
        "problems": open_request.state.problems,
    }


def _report_problems(state: ApprovalState) -> None:
    if state.problems:
        print_status("\n".join([f"problems of {state.version.ref}:", *indent_lines(state.problems)]))


def _store() -> Store:
    from limbeck.registry.mlflow.store import Store

    return Store()
