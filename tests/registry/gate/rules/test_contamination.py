"""The rule on contamination: the share of a task's documents that occur in the training text."""

from __future__ import annotations

from collections.abc import Callable

from limbeck.registry.records import Contamination, Overlap, Scorecard
from tests.registry.gate.rules.rule_helpers import STUDENT, outcomes


def test_contamination(make_card: Callable[..., Scorecard]) -> None:
    rules = {"lineage": {"max_contamination": 0.02}}
    overlaps = {"bits": Overlap(documents=100, contaminated=2), "choice": Overlap(documents=100, contaminated=3)}
    contamination = Contamination(data_digest="d", ngram=13, tasks=overlaps)
    name = "lineage.max_contamination"
    assert outcomes(rules, make_card(STUDENT.digest, contamination=contamination)) == {
        "quality.min_retention": "pass",
        f"{name}.bits": "pass",
        f"{name}.choice": "fail",
    }
    unknown = make_card(STUDENT.digest)
    assert outcomes(rules, unknown)[name] == "inconclusive"
    assert name not in outcomes({}, unknown)
