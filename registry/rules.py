"""A policy's rules applied to the evidence about a version: a verdict, rule by rule with the numbers."""

from __future__ import annotations

from registry import rule_plugins, rules_approvals, rules_cost, rules_origin, rules_quality
from registry.evidence import Evidence
from registry.limits import rule
from registry.policy import Policy
from registry.records import Outcome, Verdict


def judge(policy: Policy, evidence: Evidence) -> Verdict:
    """Apply a policy to what is known of a version.

    Returns:
        A verdict bound to the digests of artifact, tasks and prompts: pass if every rule passes, fail if one
        fails, else inconclusive.
    """
    version, card = evidence.version, evidence.card
    scorecard = card.digest() if card else ""
    rules = [
        *rules_quality.judge(policy, evidence),
        *rules_cost.cost(policy.cost, evidence),
        *rules_origin.lineage(policy.lineage, evidence),
        *rules_origin.licence(policy.licence, evidence),
    ]
    if version.kind == "onnx":
        rules += rules_cost.parity(policy.parity, evidence)
    rules += rules_approvals.judge(policy, evidence)
    rules += rule_plugins.judge(policy.rules, evidence)
    if not rules:
        words = f"the policy asks nothing of a version of the kind {version.kind}"
        rules = [rule("policy", "inconclusive", words)]
    outcomes = {each.outcome for each in rules}
    outcome: Outcome = "fail" if "fail" in outcomes else "inconclusive" if len(outcomes) > 1 else rules[0].outcome
    return Verdict(
        outcome=outcome,
        rules=tuple(rules),
        model=version.ref,
        artifact=version.digest,
        tasks_digest=card.tasks_digest if card else "",
        prompts_digest=card.prompts_digest if card else "",
        scorecard=scorecard,
        policy=policy.digest(),
        created=evidence.now,
    )
