"""Rules on cost and latency: the number measured, or its interval, compared with each limit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.records import Estimate, Scorecard
from tests.registry.gate.rules.rule_helpers import STUDENT, outcomes, results


@pytest.mark.parametrize(
    ("rule", "passes", "fails"),
    [
        ("max_cost_ratio", 0.25, 0.24),
        ("max_p95_ms", 30, 29.9),
        ("max_disk_bytes", 4000, 3999),
        ("max_peak_rss_bytes", 10_000, 9_999),
        ("min_decode_tokens_per_s", 300, 301),
    ],
)
def test_a_measured_number_is_compared_with_the_limit(
    make_card: Callable[..., Scorecard], rule: str, passes: float, fails: float
) -> None:
    card = make_card(STUDENT.digest)
    assert outcomes({"cost": {rule: passes}}, card)[f"cost.{rule}"] == "pass"
    assert outcomes({"cost": {rule: fails}}, card)[f"cost.{rule}"] == "fail"
    without_cost = make_card(STUDENT.digest, cost=None, cost_ratio=None)
    assert outcomes({"cost": {rule: passes}}, without_cost)[f"cost.{rule}"] == "inconclusive"
    assert list(outcomes({}, without_cost)) == ["quality.min_retention"]  # the policy has no cost limit


def test_the_whole_interval_has_to_be_within_the_limit(make_card: Callable[..., Scorecard]) -> None:
    card = make_card(STUDENT.digest)
    assert card.relative is not None
    relative = card.relative.model_copy(update={"cost_ratio_interval": Estimate(value=0.25, low=0.2, high=0.4)})
    evidence = Evidence(STUDENT, card.model_copy(update={"relative": relative}))
    for limit, outcome in ((0.4, "pass"), (0.3, "inconclusive"), (0.19, "fail")):
        assert results({"cost": {"max_cost_ratio": limit}}, evidence)["cost.max_cost_ratio"][0] == outcome
    assert results({"cost": {"max_peak_device_bytes": 1}}, evidence)["cost.max_peak_device_bytes"][0] == "pass"


def test_an_interval_is_compared_with_a_lower_limit_by_its_lower_end(make_card: Callable[..., Scorecard]) -> None:
    card = make_card(STUDENT.digest)
    assert card.cost is not None
    interval = Estimate(value=300, low=280, high=320)
    cost = card.cost.model_copy(update={"intervals": {"decode_tokens_per_s": interval}})
    evidence = Evidence(STUDENT, card.model_copy(update={"cost": cost}))
    rule = "min_decode_tokens_per_s"
    for limit, outcome in ((280, "pass"), (300, "inconclusive"), (321, "fail")):
        assert results({"cost": {rule: limit}}, evidence)[f"cost.{rule}"][0] == outcome
