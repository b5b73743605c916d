"""Rules on licences: those along the lineage, and whether the teacher's licence allows distillation."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.limits import rule_result
from limbeck.registry.policy.schema import LicenceRules, LineageRules
from limbeck.registry.provenance.licences import UNKNOWN_TEACHER, LineageLicence, is_allowed, terms_of_licence
from limbeck.registry.records import RuleResult

# Key of the policy -> role in the lineage, where its licence is stated, the message without such a part.
ROLES = {
    "teacher": (
        "teacher",
        "teacher.licence of the recipe, or limbeck register --licence",
        "it was not distilled from another model",
    ),
    "base_model": ("base model", "students.NAME.licence of the recipe", "it did not begin as a pretrained model"),
    "data": (
        "data",
        "data.licence of the recipe, or limbeck register --data-licence",
        "it has no recorded training text",
    ),
}


def distillation_licence_results(rules: LineageRules, evidence: Evidence) -> Iterator[RuleResult]:
    """Whether the licence of each teacher lets a student learn from it. Empty if the policy does not require it."""
    if not rules.require_distillation_licence:
        return
    name, teachers = "lineage.require_distillation_licence", _licences_of_role(evidence, "teacher")
    if not teachers:
        yield rule_result(name, "pass", "it was not distilled from another model")
        return
    forbidding = [each for each in teachers if each.allows_distillation is False]
    if forbidding:
        texts = [f"the licence of {each.origin} forbids learning from it{_licence_note(each)}" for each in forbidding]
        yield rule_result(name, "fail", "; ".join(texts))
        return
    unknown = [_describe_unknown_terms(each) for each in teachers if each.allows_distillation is None]
    if unknown:
        yield rule_result(name, "inconclusive", "; ".join(unknown))
        return
    origins = ", ".join(dict.fromkeys(each.origin for each in teachers))
    yield rule_result(name, "pass", f"the licence of {origins} allows learning from it")


def licence_results(rules: LicenceRules, evidence: Evidence) -> Iterator[RuleResult]:
    """A result for each part of the lineage whose licences the policy restricts."""
    for key, (role, stated_in, no_such_part) in ROLES.items():
        allowed = getattr(rules, key)
        if allowed is None:
            continue
        lineage_licences = _licences_of_role(evidence, role)
        if not lineage_licences:
            yield rule_result(f"licence.{key}", "pass", no_such_part)
        for each in lineage_licences:
            if each.origin == UNKNOWN_TEACHER:
                yield rule_result(f"licence.{key}", "inconclusive", _describe_unknown_teacher(each))
            else:
                yield _licence_result(f"licence.{key}", _describe_part(each), each.licence, allowed, stated_in)
    if rules.code is not None:
        licence = evidence.version.code_licence
        yield _licence_result("licence.code", "the code that made it", licence, rules.code, "code_licence")


def _describe_unknown_terms(teacher: LineageLicence) -> str:
    if teacher.origin == UNKNOWN_TEACHER:
        return _describe_unknown_teacher(teacher)
    return (
        f"whether the licence of {teacher.origin} allows a student to learn from it is unknown; set "
        "teacher.licence_allows_distillation in the recipe and distil again, or state its licence: limbeck register "
        "--licence"
    )


def _describe_unknown_teacher(teacher: LineageLicence) -> str:
    name = teacher.version.partition("/")[0]
    return (
        f"the teacher of {teacher.version} is not recorded; state it: limbeck register FOLDER --name {name} "
        "--parent MODEL"
    )


def _describe_part(lineage_licence: LineageLicence) -> str:
    if lineage_licence.role == "data":
        return f"the training text of {lineage_licence.version}"
    return f"{lineage_licence.origin}, the {lineage_licence.role} of {lineage_licence.version},"


def _licence_result(
    name: str, subject: str, licence: str | None, allowed: tuple[str, ...], stated_in: str
) -> RuleResult:
    passes = is_allowed(licence, allowed)
    if passes is None:
        return rule_result(name, "inconclusive", f"the licence of {subject} is unknown; state it: {stated_in}")
    message = f"{subject} is under {licence}, allowed {'are' if len(allowed) > 1 else 'is'} {', '.join(allowed)}"
    return rule_result(name, "pass" if passes else "fail", message)


def _licences_of_role(evidence: Evidence, role: str) -> list[LineageLicence]:
    """The licences of a role along the lineage. A teacher that it learnt nothing from has to be allowed too."""
    version = evidence.version
    found = [each for each in evidence.lineage_licences if each.role == role]
    if not found and role == "teacher" and version.teacher is not None:
        allows = version.licence_allows_distillation
        return [LineageLicence("teacher", version.ref, version.teacher, version.teacher_licence, allows)]
    return found


def _licence_note(lineage_licence: LineageLicence) -> str:
    terms = terms_of_licence(lineage_licence.licence)
    if terms is None or terms.allows_distillation:
        return ""
    return f" ({lineage_licence.licence}: {terms.summary})"
