"""Rules on licences: which are allowed along the lineage, and whether the teacher's allows distillation."""

from __future__ import annotations

from typing import Any

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.provenance.licences import UNKNOWN_TEACHER, LineageLicence
from tests.registry.gate.rules.rule_helpers import STUDENT, results, retention_policy


def test_the_teachers_licence_has_to_allow_distillation() -> None:
    policy = retention_policy(lineage={"require_distillation_licence": True})
    rule = "lineage.require_distillation_licence"

    def result(**changes: Any) -> tuple[str, str]:
        verdict = apply_policy(policy, Evidence(STUDENT.model_copy(update=changes), None, None))
        return next((each.outcome, each.message) for each in verdict.rules if each.rule == rule)

    assert result(licence_allows_distillation=True)[0] == "pass"
    forbidden = result(licence_allows_distillation=False)
    assert forbidden == ("fail", "the licence of still/1 forbids learning from it")
    outcome, message = result()
    assert outcome == "inconclusive"
    assert "still/1" in message
    assert "teacher.licence_allows_distillation" in message
    assert result(kind="teacher", teacher=None)[0] == "pass"
    assert all(each.rule != rule for each in apply_policy(retention_policy(), Evidence(STUDENT, None)).rules)


def test_licences_that_are_allowed() -> None:
    def outcome(allowed: list[str], licence: str | None, role: str = "teacher") -> str:
        lineage_licence = LineageLicence(role, "still/4", "still/1", licence, None)  # type: ignore[arg-type]
        evidence = Evidence(STUDENT, None, lineage_licences=(lineage_licence,))
        return results({"licence": {role: allowed}}, evidence)[f"licence.{role}"][0]

    for role in ("teacher", "data"):
        assert outcome(["apache-2.0"], "Apache 2.0", role) == "pass"
        assert outcome(["apache-2.0"], "llama2", role) == "fail"
        assert outcome(["apache-2.0"], "Apache-2.0 AND llama2", role) == "fail"
        assert outcome(["apache-2.0"], "Apache-2.0 OR llama2", role) == "pass"
        assert outcome(["apache-2.0"], None, role) == "inconclusive"
    assert results({"licence": {"teacher": ["mit"]}}, Evidence(STUDENT, None))["licence.teacher"][0] == "inconclusive"


def test_a_student_whose_teacher_is_not_recorded_is_inconclusive() -> None:
    unknown = LineageLicence("teacher", "still/4", UNKNOWN_TEACHER, None, None)
    evidence = Evidence(STUDENT.model_copy(update={"parent": None, "teacher": None}), None, lineage_licences=(unknown,))
    rules = {"licence": {"teacher": ["mit"]}, "lineage": {"require_distillation_licence": True}}
    found = results(rules, evidence)
    message = "the teacher of still/4 is not recorded; state it: limbeck register FOLDER --name still --parent MODEL"
    assert found == {
        "licence.teacher": ("inconclusive", message),
        "lineage.require_distillation_licence": ("inconclusive", message),
    }
