"""The rule on approvals: enough people who did not make or request the version approve its exact files."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.core.signing import Signature, verify_signature
from limbeck.registry.gate.approvals import ineligibility_reason, signature_payload
from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.limits import rule_result
from limbeck.registry.policy.schema import ApprovalRules, Policy
from limbeck.registry.records import Approval, Request, RuleResult

NAME = "approvals.needed"


def approval_results(policy: Policy, evidence: Evidence) -> Iterator[RuleResult]:
    """Who approved, who rejected, and whose answer does not count. Empty if the policy needs no approval.

    Only the newest answer of each person counts. A rejection blocks, whoever made it, until that person approves or
    there is a new request.
    """
    rules, version, request = policy.approvals, evidence.version, evidence.request
    if not rules.needed:
        return
    need = describe_needed_approvals(rules)
    ignored = "".join(f"; {why}" for why in evidence.ignored_records)
    if request is None or not _request_matches(request, evidence):
        command = f"limbeck request {version.ref} --alias {evidence.alias} --reason ..."
        yield rule_result(NAME, "inconclusive", f"{need}, and there is no request{ignored}; run: {command}")
        return
    answers = _newest_answers(evidence.approvals, request)
    rejections = [each for each in answers.values() if each.answer == "reject"]
    if rejections:
        yield rule_result(NAME, "fail", "; ".join(f"{each.who} rejected it: {each.reason}" for each in rejections))
        return
    ignored_reasons = {who: _ignored_reason(policy, evidence, request, each) for who, each in answers.items()}
    approvers = sorted(who for who, why in ignored_reasons.items() if why is None)
    message = f"{', '.join(approvers) or 'nobody'} approved, {need}"
    message += "".join(
        f"; the answer of {who} does not count: {why}" for who, why in sorted(ignored_reasons.items()) if why
    )
    message += ignored
    if len(approvers) >= rules.needed:
        yield rule_result(NAME, "pass", message)
    else:
        command = f"limbeck approve {version.ref} --alias {evidence.alias}"
        yield rule_result(NAME, "inconclusive", f"{message}; run: {command}")


def describe_needed_approvals(rules: ApprovalRules) -> str:
    """How many people have to approve, and which, such as `1 person has to approve of ann, bob`."""
    of_people = f" of {', '.join(rules.people)}" if rules.people else ""
    return f"{rules.needed} {'person has' if rules.needed == 1 else 'people have'} to approve{of_people}"


def _newest_answers(approvals: tuple[Approval, ...], request: Request) -> dict[str, Approval]:
    """Person -> newest answer to the request."""
    return {each.who: each for each in sorted(approvals, key=lambda each: each.when) if _is_answer_to(each, request)}


def _request_matches(request: Request, evidence: Evidence) -> bool:
    version = evidence.version
    expected = (version.name, version.version, version.digest, evidence.alias)
    return (request.name, request.version, request.artifact, request.alias) == expected


def _is_answer_to(approval: Approval, request: Request) -> bool:
    return approval.request == request.digest() and approval.artifact == request.artifact


def _ignored_reason(policy: Policy, evidence: Evidence, request: Request, approval: Approval) -> str | None:
    """Why an approval does not count; None if it does."""
    why = ineligibility_reason(evidence.version, request, policy, approval.who)
    if why is not None:
        return why
    keys = policy.approvals.keys
    if not keys:
        return None
    if approval.who not in keys:
        return "the policy has no key of theirs"
    if approval.key is None or approval.signature is None:
        return "it is not signed"
    signature = Signature(approval.key, approval.signature)
    if not verify_signature(signature_payload(approval), signature, keys[approval.who]):
        return "it is not signed with their key"
    return None
