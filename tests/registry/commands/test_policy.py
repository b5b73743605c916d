"""`limbeck policy check`, as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]


def test_a_policy_is_described(limbeck: Limbeck, policy: Path) -> None:
    result = limbeck("policy", "check", policy)
    assert result.code == 0
    assert "at least 0.8 of the teacher's quality" in result.out
    assert result.err.endswith("is valid\n")
    report = json.loads(limbeck("policy", "check", policy, "--format", "json").out)
    assert {"quality.min_retention", "cost.max_cost_ratio"} <= report["rules"].keys()
    assert report["verdict"] is None
    policy.write_text("[quality]\nmin_retantion = 0.8\n")
    result = limbeck("policy", "check", policy)
    assert (result.code, "did you mean min_retention" in result.err) == (2, True)


def test_a_policy_is_applied_to_a_version_without_writing(scored: Still, limbeck: Limbeck, policy: Path) -> None:
    passing = limbeck("policy", "check", policy, "--model", "still/4")
    assert (passing.code, passing.err) == (0, "still/4 passes\n")
    failing = limbeck("policy", "check", policy, "--model", "still/5", "--format", "json")
    assert (failing.code, "still/5 does not pass: fail" in failing.err) == (1, True)
    assert json.loads(failing.out)["verdict"]["outcome"] == "fail"
    assert scored.store.findings.verdicts(scored.variants["int8-weight"]) == []
