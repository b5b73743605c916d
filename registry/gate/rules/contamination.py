"""The rule on contamination: task documents that occur in the training text (`lineage.max_contamination`)."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.limits import rule_result
from limbeck.registry.policy.schema import LineageRules
from limbeck.registry.records import RuleResult

NAME = "lineage.max_contamination"


def contamination_results(rules: LineageRules, evidence: Evidence) -> Iterator[RuleResult]:
    """A result for each task. Empty if the policy has no limit, or if there is no scorecard of the version's files."""
    version, scorecard = evidence.version, evidence.scorecard
    if rules.max_contamination is None or scorecard is None or scorecard.artifact != version.digest:
        return
    if scorecard.contamination is None:
        message = f"its overlap with the training text is unknown; run limbeck eval {version.ref} where that text is"
        yield rule_result(NAME, "inconclusive", message)
        return
    for task, overlap in scorecard.contamination.tasks.items():
        message = f"{overlap.contaminated} of {overlap.documents} documents of {task} occur in the training text"
        message += f" ({overlap.share:.4f}), at most {rules.max_contamination:.4f} is required"
        yield rule_result(f"{NAME}.{task}", "pass" if overlap.share <= rules.max_contamination else "fail", message)
