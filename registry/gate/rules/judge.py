"""A policy's rules applied to the evidence about a version: a verdict, rule by rule with the numbers."""

from __future__ import annotations

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules import approvals, cost, lineage, quality
from limbeck.registry.gate.rules import plugins as plugins_module
from limbeck.registry.gate.rules.bounds import rule_result
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import Outcome, Verdict


def apply_policy(policy: Policy, evidence: Evidence) -> Verdict:
    """Apply a policy to what is known of a version.

    Returns:
        A verdict bound to the digests of artifact, tasks and prompts: pass if every rule passes, fail if one
        fails, else inconclusive.
    """
    version, card = evidence.version, evidence.scorecard
    scorecard = card.digest() if card else ""
    rules = [
        *quality.quality_results(policy, evidence),
        *cost.cost_results(policy.cost, evidence),
        *lineage.lineage_results(policy.lineage, evidence),
        *lineage.licence_results(policy.licence, evidence),
    ]
    if version.kind == "onnx":
        rules += cost.parity_results(policy.parity, evidence)
    rules += approvals.approval_results(policy, evidence)
    rules += plugins_module.plugin_results(policy.rules, evidence)
    if not rules:
        words = f"the policy asks nothing of a version of the kind {version.kind}"
        rules = [rule_result("policy", "inconclusive", words)]
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
        created=evidence.judged_at,
    )
