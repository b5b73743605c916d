"""The gate's rule on approvals: enough people, neither who made it nor who asked for it, of these very files."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.core.signing import Signature, verify_signature
from limbeck.registry.gate.approvals import ineligibility_reason, signature_payload
from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.bounds import rule_result
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import Approval, Request, RuleResult

NAME = "approvals.needed"


def approval_results(policy: Policy, evidence: Evidence) -> Iterator[RuleResult]:
    """Who agreed, who did not, and whose word does not count.

    The newest answer of a person is theirs. A rejection blocks, whoever it is of, until they approve or the alias
    is asked for anew.
    """
    asked, version, request = policy.approvals, evidence.version, evidence.request
    if not asked.needed:
        return
    of = f" of {', '.join(asked.people)}" if asked.people else ""
    need = f"{asked.needed} {'person has' if asked.needed == 1 else 'people have'} to approve{of}"
    void = "".join(f"; {why}" for why in evidence.ignored_records)
    if request is None or not _request_matches(request, evidence):
        ask = f"limbeck request {version.ref} --alias {evidence.alias} --reason ..."
        yield rule_result(NAME, "inconclusive", f"{need}, and nobody asked for it{void}; run: {ask}")
        return
    answers = {
        each.who: each for each in sorted(evidence.approvals, key=lambda a: a.when) if _answers_request(each, request)
    }
    if rejections := [each for each in answers.values() if each.answer == "reject"]:
        yield rule_result(NAME, "fail", "; ".join(f"{each.who} rejected it: {each.reason}" for each in rejections))
        return
    why_not = {who: _ignored_reason(policy, evidence, request, each) for who, each in answers.items()}
    counting = [who for who, why in why_not.items() if why is None]
    words = f"{', '.join(sorted(counting)) or 'nobody'} approved, {need}"
    words += "".join(f"; the answer of {who} does not count: {why}" for who, why in sorted(why_not.items()) if why)
    words += void
    if len(counting) >= asked.needed:
        yield rule_result(NAME, "pass", words)
    else:
        yield rule_result(NAME, "inconclusive", f"{words}; run: limbeck approve {version.ref} --alias {evidence.alias}")


def _request_matches(request: Request, evidence: Evidence) -> bool:
    version = evidence.version
    wanted = (version.name, version.version, version.digest, evidence.alias)
    return (request.name, request.version, request.artifact, request.alias) == wanted


def _answers_request(approval: Approval, request: Request) -> bool:
    return approval.request == request.digest() and approval.artifact == request.artifact


def _ignored_reason(policy: Policy, evidence: Evidence, request: Request, approval: Approval) -> str | None:
    """Why an approval does not count; None where it does."""
    if why := ineligibility_reason(evidence.version, request, policy, approval.who):
        return why
    keys = policy.approvals.keys
    if not keys:
        return None
    if approval.who not in keys:
        return "the policy has no key of theirs"
    if approval.key is None or approval.signature is None:
        return "it is not signed"
    if not verify_signature(
        signature_payload(approval), Signature(approval.key, approval.signature), keys[approval.who]
    ):
        return "it is not signed with their key"
    return None
