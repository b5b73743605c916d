"""The gate's rules on what a version came from: text that overlaps with the tasks, and licences."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.bounds import rule_result
from limbeck.registry.policy.schema import LicenceRules, LineageRules
from limbeck.registry.provenance import licences
from limbeck.registry.provenance.licences import LineageLicence
from limbeck.registry.records import RuleResult

# What a policy names -> the role of a term of the lineage, where a recipe states it, and who has none.
ROLES = {
    "teacher": ("teacher", "teacher.licence", "it was distilled from no other model"),
    "base_model": ("base model", "students.NAME.licence", "it began as no pretrained model"),
    "data": ("data", "data.licence", "no training text is recorded of it"),
}


def lineage_results(rules: LineageRules, evidence: Evidence) -> Iterator[RuleResult]:
    """What the rules on lineage say."""
    version, card = evidence.version, evidence.scorecard
    if rules.require_distillation_licence:
        yield _distillation_result(evidence)
    if rules.max_contamination is None or card is None or card.artifact != version.digest:
        return
    name, found = "lineage.max_contamination", card.contamination
    if found is None:
        words = "its overlap with the training text has not been measured"
        yield rule_result(name, "inconclusive", f"{words}; run limbeck eval {version.ref} where that text lies")
        return
    for task, overlap in found.tasks.items():
        words = f"{overlap.contaminated} of {overlap.documents} documents of {task} occur in the training text"
        words += f" ({overlap.share:.4f}), at most {rules.max_contamination:.4f} is asked"
        yield rule_result(f"{name}.{task}", "pass" if overlap.share <= rules.max_contamination else "fail", words)


def _distillation_result(evidence: Evidence) -> RuleResult:
    name, teachers = "lineage.require_distillation_licence", _licences_of_role(evidence, "teacher")
    if not teachers:
        return rule_result(name, "pass", "it was distilled from no other model")
    if forbidding := [term for term in teachers if term.allows_distillation is False]:
        words = "; ".join(
            f"to learn from {term.origin}: its licence forbids it{_licence_note(term)}" for term in forbidding
        )
        return rule_result(name, "fail", words)
    if unknown := [term.origin for term in teachers if term.allows_distillation is None]:
        words = "; ".join(f"whether the licence of {of} lets a student learn from it is not known" for of in unknown)
        fix = "say so in the recipe: teacher.licence_allows_distillation, and distil again"
        return rule_result(name, "inconclusive", f"{words}; {fix}")
    words = ", ".join(dict.fromkeys(term.origin for term in teachers))
    return rule_result(name, "pass", f"to learn from {words}: the licence allows it")


def licence_results(rules: LicenceRules, evidence: Evidence) -> Iterator[RuleResult]:
    """What the rules on licences say."""
    for kind, (role, key, none) in ROLES.items():
        allowed = getattr(rules, kind)
        if allowed is None:
            continue
        terms = _licences_of_role(evidence, role)
        if not terms:
            yield rule_result(f"licence.{kind}", "pass", none)
        for term in terms:
            what = (
                f"the training text of {term.version}"
                if role == "data"
                else f"{term.origin}, the {role} of {term.version},"
            )
            yield _licence_result(f"licence.{kind}", what, term.licence, allowed, key)
    if rules.code is not None:
        yield _licence_result(
            "licence.code", "the code that made it", evidence.version.code_licence, rules.code, "code_licence"
        )


def _licence_result(name: str, subject: str, stated: str | None, allowed: tuple[str, ...], key: str) -> RuleResult:
    within = licences.is_allowed(stated, allowed)
    if within is None:
        return rule_result(name, "inconclusive", f"the licence of {subject} is not known; say it in the recipe: {key}")
    words = f"{subject} is under {stated}, allowed {'are' if len(allowed) > 1 else 'is'} {', '.join(allowed)}"
    return rule_result(name, "pass" if within else "fail", words)


def _licences_of_role(evidence: Evidence, role: str) -> list[LineageLicence]:
    """The terms of a role; those of a teacher that the lineage says nothing about are not known."""
    version = evidence.version
    terms = [term for term in evidence.lineage_licences if term.role == role]
    if not terms and role == "teacher" and version.teacher is not None:
        allows = version.licence_allows_distillation
        terms = [LineageLicence("teacher", version.ref, version.teacher, version.teacher_licence, allows)]
    if not terms and role == "data" and version.kind != "teacher":
        terms = [LineageLicence("data", version.ref, "", version.data_licence, None)]
    return terms


def _licence_note(term: LineageLicence) -> str:
    known = licences.terms_of_licence(term.licence)
    return f" ({term.licence}: {known.summary})" if term.licence and known and not known.allows_distillation else ""
