"""Which scorecard is the evidence for a policy."""

from __future__ import annotations

from collections.abc import Callable

from limbeck.registry.gate.evidence import best_scorecard
from limbeck.registry.records import Scorecard
from tests.registry.gate.rules.rule_helpers import STUDENT, retention_policy


def test_the_newest_scorecard_that_answers_the_whole_policy(make_card: Callable[..., Scorecard]) -> None:
    quality = {"min_retention": 0.8, "tasks": ["bits"], "min_documents": 100}
    policy = retention_policy(quality=quality, cost={"max_p95_ms": 100})
    full = make_card(STUDENT.digest)
    for newer in (
        make_card("b" * 64),
        make_card(STUDENT.digest, relative=None),
        make_card(STUDENT.digest, tasks=("choice",)),
        make_card(STUDENT.digest, documents=10),
        make_card(STUDENT.digest, cost=None),
    ):
        assert best_scorecard(policy, STUDENT, [full, newer]) == full
        assert best_scorecard(policy, STUDENT, [newer]) == newer
    newest = make_card(STUDENT.digest, usd=3.0)
    assert best_scorecard(policy, STUDENT, [full, newest]) == newest
    assert best_scorecard(policy, STUDENT, []) is None
