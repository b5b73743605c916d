"""Applies a policy to the evidence about a version. The result is a Verdict: each rule's outcome with its numbers.

To add a rule to the policy: a key in `limbeck.registry.policy.schema`, a function here beside the others that yields
its results, its text in `limbeck.registry.policy.describe`, a line in docs/policy.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.approvals import approval_results
from limbeck.registry.gate.rules.contamination import contamination_results
from limbeck.registry.gate.rules.cost_and_latency import cost_results
from limbeck.registry.gate.rules.deployment import deployment_results
from limbeck.registry.gate.rules.licences import distillation_licence_results, licence_results
from limbeck.registry.gate.rules.limits import rule_result
from limbeck.registry.gate.rules.parity import parity_results
from limbeck.registry.gate.rules.plugins import plugin_results
from limbeck.registry.gate.rules.quality import quality_results
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import Outcome, RuleResult, Verdict


def apply_policy(policy: Policy, evidence: Evidence) -> Verdict:
    """Apply a policy to the evidence about a version.

    Returns:
        A verdict bound to the digests of the artifact, its tasks and prompts: pass if every rule passes, fail if one
        fails, else inconclusive.
    """
    version, scorecard = evidence.version, evidence.scorecard
    results = [
        *quality_results(policy, evidence),
        *cost_results(policy.cost, evidence),
        *distillation_licence_results(policy.lineage, evidence),
        *contamination_results(policy.lineage, evidence),
        *licence_results(policy.licence, evidence),
    ]
    if version.kind == "onnx":
        results += parity_results(policy.parity, evidence)
    results += approval_results(policy, evidence)
    results += plugin_results(policy.rules, evidence)
    if not results:
        message = f"the policy has no rule for a version of kind {version.kind}"
        results = [rule_result("policy", "inconclusive", message)]
    results += deployment_results(policy.deploy, evidence)  # alone it is not enough for a pass
    return Verdict(
        outcome=overall_outcome(results),
        rules=tuple(results),
        model=version.ref,
        artifact=version.digest,
        tasks_digest=scorecard.tasks_digest if scorecard else "",
        prompts_digest=scorecard.prompts_digest if scorecard else "",
        scorecard=scorecard.digest() if scorecard else "",
        policy=policy.digest(),
        created=evidence.judged_at,
    )


def overall_outcome(results: Sequence[RuleResult]) -> Outcome:
    """Fail if one rule fails, pass if all pass, else inconclusive."""
    outcomes = {each.outcome for each in results}
    if "fail" in outcomes:
        return "fail"
    return "pass" if outcomes == {"pass"} else "inconclusive"
