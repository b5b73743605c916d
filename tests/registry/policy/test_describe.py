"""The description of a policy has every rule, as `limbeck policy check` prints it."""

from __future__ import annotations

from limbeck.registry.policy.describe import describe_policy
from limbeck.registry.policy.schema import CostLimits, Policy
from limbeck.registry.records import FIGURES, limit_name


def test_every_rule_is_described() -> None:
    policy = Policy.model_validate(
        {
            "quality": {"min_retention": 0.9, "confidence": 0.9, "margin": {"acc": 0.02}},
            "cost": {"max_p95_ms": 200, "max_disk_bytes": 50_000_000, "min_decode_tokens_per_s": 100},
            "approvals": {"needed": 1, "people": ["ann", "bob"]},
            "override": {"people": ["carol"]},
        }
    )
    lines = dict(describe_policy(policy))
    interval = "compared with the lower end of its 90% interval"
    assert lines["quality.min_retention"] == f"at least 0.9 of the teacher's quality, mean over the tasks, {interval}"
    assert lines["cost.max_p95_ms"] == f"at most 200 {FIGURES['p95_ms'].description}"
    assert lines["cost.max_disk_bytes"] == "at most 50,000,000 bytes on disk"
    assert lines["cost.min_decode_tokens_per_s"] == "at least 100 new tokens per second"
    assert lines["approvals.needed"] == "approved by 1 of ann, bob, neither its author nor who made the request"
    assert lines["deploy.aliases"] == "under production: a version that limbeck serve runs"
    assert lines["override"] == "carol may override it"
    assert lines.keys() >= {"quality.margin.acc", "parity.required"}


def test_every_cost_limit_is_described() -> None:
    limits = {limit_name(name): 1 for name in FIGURES} | {"max_cost_ratio": 1}
    lines = dict(describe_policy(Policy(cost=CostLimits.model_validate(limits))))
    assert {f"cost.{key}" for key in limits} <= lines.keys()
