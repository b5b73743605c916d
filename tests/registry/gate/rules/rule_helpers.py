"""Versions to apply rules to, and the results of the rules by name."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import Scorecard, Version

ONNX = Version(
    name="still",
    version=4,
    kind="onnx",
    engine="onnxruntime",
    digest="a" * 64,
    source="",
    created=datetime(2026, 1, 1, tzinfo=UTC),
    precision="fp32",
    parent="still/2",
    teacher="still/1",
)
STUDENT = ONNX.model_copy(update={"kind": "student", "engine": "torch", "parent": "still/1"})
TEACHER_DIGEST = "0" * 64  # of the teacher that the scorecards of `make_card` are relative to


def retention_policy(**rules: Any) -> Policy:
    """A policy that requires a retention of 0.8, and `rules` besides."""
    return Policy.model_validate({"quality": {"min_retention": 0.8}} | rules)


def outcomes(rules: dict[str, Any], card: Scorecard | None, version: Version = STUDENT) -> dict[str, str]:
    """Rule -> outcome, by `retention_policy` and `rules`."""
    verdict = apply_policy(retention_policy(**rules), Evidence(version, card, teacher_digest=TEACHER_DIGEST))
    assert all(rule.message for rule in verdict.rules)
    return {rule.rule: rule.outcome for rule in verdict.rules}


def results(rules: dict[str, Any], evidence: Evidence) -> dict[str, tuple[str, str]]:
    """Rule -> (outcome, message), by a policy of `rules` alone."""
    verdict = apply_policy(Policy.model_validate(rules), evidence)
    return {each.rule: (each.outcome, each.message) for each in verdict.rules}
