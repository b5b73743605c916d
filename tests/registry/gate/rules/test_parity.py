"""Rules on parity: an ONNX variant compared with its PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.records import Parity, Scorecard
from tests.registry.gate.rules.rule_helpers import ONNX, STUDENT, TEACHER_DIGEST, outcomes, retention_policy


def test_parity(make_card: Callable[..., Scorecard], make_parity: Callable[..., Parity]) -> None:
    card = make_card(ONNX.digest)

    def parity_outcomes(parity: Parity | None, precision: str = "fp32", **limits: Any) -> dict[str, str]:
        version = ONNX.model_copy(update={"precision": precision})
        evidence = Evidence(version, card, parity, teacher_digest=TEACHER_DIGEST, parent_digest="r")
        verdict = apply_policy(retention_policy(parity=limits), evidence)
        return {rule.rule: rule.outcome for rule in verdict.rules if rule.rule.startswith("parity")}

    assert parity_outcomes(make_parity()) == {"parity.required": "pass"}
    assert parity_outcomes(None) == {"parity.required": "inconclusive"}
    assert parity_outcomes(None, required=False) == {}
    assert parity_outcomes(make_parity(reference="another")) == {"parity.required": "inconclusive"}
    assert parity_outcomes(make_parity(passed=False)) == {"parity.required": "fail"}
    assert parity_outcomes(make_parity(passed=False), "int8-weight") == {"parity.required": "fail"}
    limits = dict(max_mean_kl=0.01, min_top1_agreement=0.9, max_p99_kl=0.1, max_bits_per_byte_increase=0.05)
    names = ["parity.required", *(f"parity.{name}" for name in limits)]
    assert parity_outcomes(make_parity(p99_kl=0.1), **limits) == dict.fromkeys(names, "pass")
    worse = make_parity(mean_kl=0.011, top1_agreement=0.89, p99_kl=0.11, bits_per_byte=2.06)
    assert parity_outcomes(worse, **limits) == dict.fromkeys(names, "fail") | {"parity.required": "pass"}
    assert parity_outcomes(make_parity(), required=False, max_mean_kl=0.01) == {"parity.max_mean_kl": "pass"}
    # Kept under its user's own limit: only a policy that has limits of its own accepts it.
    above = make_parity(limits={"mean_kl": 0.03}, exceeded=("mean_kl",), max_change=0.1)
    assert parity_outcomes(above) == {"parity.required": "fail"}
    assert parity_outcomes(above, max_mean_kl=0.01) == {"parity.required": "pass", "parity.max_mean_kl": "pass"}
    # Parity is for ONNX variants only.
    assert outcomes({}, make_card(STUDENT.digest), STUDENT) == {"quality.min_retention": "pass"}
