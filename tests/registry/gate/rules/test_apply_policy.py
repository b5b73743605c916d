"""A verdict is bound to what it is about, and one failing rule fails it."""

from __future__ import annotations

from collections.abc import Callable

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.policy.schema import ParityLimits, Policy
from limbeck.registry.records import Scorecard
from tests.registry.gate.rules.rule_helpers import STUDENT, TEACHER_DIGEST, retention_policy


def test_a_verdict_is_bound_to_the_artifact_tasks_prompts_and_policy(make_card: Callable[..., Scorecard]) -> None:
    card, policy = make_card(STUDENT.digest), retention_policy()
    verdict = apply_policy(policy, Evidence(STUDENT, card, teacher_digest=TEACHER_DIGEST))
    assert (verdict.model, verdict.artifact, verdict.scorecard) == ("still/4", STUDENT.digest, card.digest())
    assert (verdict.tasks_digest, verdict.prompts_digest, verdict.policy) == ("tasks", "prompts", policy.digest())


def test_one_failing_rule_fails_the_verdict(make_card: Callable[..., Scorecard]) -> None:
    card = make_card(STUDENT.digest, retention=(0.8, 0.7, 0.9))  # inconclusive
    policy = retention_policy(cost={"max_p95_ms": 1})
    verdict = apply_policy(policy, Evidence(STUDENT, card, teacher_digest=TEACHER_DIGEST))
    assert verdict.outcome == "fail"


def test_a_policy_without_a_rule_for_the_version_is_inconclusive() -> None:
    verdict = apply_policy(Policy(parity=ParityLimits(max_mean_kl=0.1)), Evidence(STUDENT, None))
    assert (verdict.outcome, verdict.rules[0].message) == (
        "inconclusive",
        "the policy has no rule for a version of kind student",
    )
