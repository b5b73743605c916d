"""Rules on quality: retention, margins, tasks, documents and the age of the scorecard."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.records import Estimate, Scorecard
from tests.registry.gate.rules.rule_helpers import STUDENT, TEACHER_DIGEST, outcomes, results, retention_policy


@pytest.mark.parametrize(
    ("retention", "outcome"),
    [
        ((0.9, 0.85, 0.95), "pass"),
        ((0.9, 0.80, 1.0), "pass"),  # the limit itself
        ((0.9, 0.79, 0.99), "inconclusive"),
        ((0.8, 0.7, 0.8), "inconclusive"),
        ((0.7, 0.6, 0.79), "fail"),
        ((float("nan"), float("nan"), float("nan")), "inconclusive"),
    ],
)
def test_the_whole_interval_has_to_reach_the_limit(
    make_card: Callable[..., Scorecard], retention: tuple[float, float, float], outcome: str
) -> None:
    evidence = Evidence(STUDENT, make_card(STUDENT.digest, retention=retention), teacher_digest=TEACHER_DIGEST)
    verdict = apply_policy(retention_policy(), evidence)
    assert verdict.outcome == outcome
    assert verdict.rules[0].message.startswith(
        f"retention {retention[0]:.4f} [{retention[1]:.4f}, {retention[2]:.4f}], at least 0.8000 is required"
    )


def test_a_version_without_a_scorecard_of_its_files_and_its_teacher_is_inconclusive(
    make_card: Callable[..., Scorecard],
) -> None:
    for card, message in (
        (None, "it has not been scored; run: limbeck eval still/4 --tasks ... --against still/1"),
        (make_card("b" * 64), "the scorecard is of other files (bbbbbbbbbbbb, not aaaaaaaaaaaa)"),
        (make_card(STUDENT.digest, relative=None), "not been scored against its teacher"),
        (make_card(STUDENT.digest, teacher_digest="1" * 64), "which is not its teacher still/1"),
        (make_card(STUDENT.digest, teacher_digest=STUDENT.digest), "scored against itself"),
    ):
        verdict = apply_policy(retention_policy(), Evidence(STUDENT, card, teacher_digest=TEACHER_DIGEST))
        assert verdict.outcome == "inconclusive"
        assert message in " ".join(rule.message for rule in verdict.rules if rule.outcome == "inconclusive")


def test_tasks_documents_and_retention_of_a_task(make_card: Callable[..., Scorecard]) -> None:
    card = make_card(STUDENT.digest, documents=99)
    rules = {"min_retention": 0.8, "tasks": ["bits"], "min_documents": 99}
    assert set(outcomes({"quality": rules}, card).values()) == {"pass"}
    found = outcomes({"quality": rules | {"tasks": ["bits", "absent"], "min_documents": 100}}, card)
    assert found["quality.tasks"] == found["quality.min_documents"] == "inconclusive"
    found = outcomes({"quality": {"min_retention": 0.8, "min_task_retention": {"bits": 0.96, "absent": 0.1}}}, card)
    assert found["quality.min_task_retention.bits"] == "inconclusive"  # 0.95 to 0.99
    assert found["quality.min_task_retention.absent"] == "inconclusive"
    found = outcomes({"quality": {"min_retention": 0.8, "min_task_retention": {"bits": 0.95, "choice": 1.0}}}, card)
    assert found["quality.min_task_retention.bits"] == "pass"
    assert found["quality.min_task_retention.choice"] == "fail"


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_margins(make_card: Callable[..., Scorecard], higher_is_better: bool) -> None:
    card = make_card(STUDENT.digest)
    assert card.relative is not None
    difference = Estimate(value=0.02, low=0.01, high=0.03, degrees_of_freedom=30)
    if higher_is_better:
        difference = Estimate(value=-0.02, low=-0.03, high=-0.01, degrees_of_freedom=30)
    tasks = {name: task.model_copy(update={"higher_is_better": higher_is_better}) for name, task in card.tasks.items()}
    relative = card.relative.model_copy(update={"difference": dict.fromkeys(tasks, difference)})
    card = card.model_copy(update={"tasks": tasks, "relative": relative})
    evidence = Evidence(STUDENT, card, teacher_digest=TEACHER_DIGEST)
    for margin, outcome in ((0.03, "pass"), (0.025, "inconclusive"), (0.009, "fail")):
        found = results({"quality": {"margin": {"acc": margin}}}, evidence)
        assert {name: each[0] for name, each in found.items()} == dict.fromkeys(
            ("quality.margin.bits", "quality.margin.choice"), outcome
        )
    _, message = results({"quality": {"margin": {"acc": 0.025}}}, evidence)["quality.margin.bits"]
    assert "documents instead of 500" in message
    # A task's own margin has precedence over that of its metric. A task that was not scored is not skipped.
    found = results({"quality": {"margin": {"bits": 0.03, "acc": 0.009, "absent": 1}}}, evidence)
    assert [found[f"quality.margin.{name}"][0] for name in ("bits", "choice", "absent")] == [
        "pass", "fail", "inconclusive",
    ]  # fmt: skip
    rules = {"margin": {"acc": 0.029}, "confidence": 0.9}
    assert results({"quality": rules}, evidence)["quality.margin.bits"][0] == "pass"
    assert results({"quality": rules | {"confidence": 0.99}}, evidence)["quality.margin.bits"][0] != "pass"


def test_the_age_of_the_scorecard(make_card: Callable[..., Scorecard]) -> None:
    rules = {"quality": {"max_age_days": 30}}
    for day, outcome in ((31, "pass"), (32, "inconclusive")):
        now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=day - 1)
        found = results(rules, Evidence(STUDENT, make_card(STUDENT.digest), judged_at=now))
        assert found["quality.max_age_days"][0] == outcome
        assert "scored on 2026-01-01, at most 30 days ago" in found["quality.max_age_days"][1]
    future = Evidence(STUDENT, make_card(STUDENT.digest), judged_at=datetime(2025, 12, 1, tzinfo=UTC))
    assert results(rules, future)["quality.max_age_days"][0] == "inconclusive"
    assert results(rules, Evidence(STUDENT, None))["scorecard"][0] == "inconclusive"


def test_without_a_recorded_teacher_the_result_names_the_one_it_was_scored_against(
    make_card: Callable[..., Scorecard],
) -> None:
    version = STUDENT.model_copy(update={"parent": None, "teacher": None})
    found = results({"quality": {"min_retention": 0.8}}, Evidence(version, make_card(version.digest)))
    assert found["quality.teacher"] == ("pass", "no teacher is recorded for it; it was scored against still/1")
    assert found["quality.min_retention"][0] == "pass"
