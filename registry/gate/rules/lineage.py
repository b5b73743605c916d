"""The gate's rules on what a version came from: text that overlaps with the tasks, and licences."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.bounds import rule
from limbeck.registry.policy.schema import LicenceRules, LineageRules
from limbeck.registry.provenance import licences
from limbeck.registry.provenance.licences import Term
from limbeck.registry.records import RuleResult

# What a policy names -> the role of a term of the lineage, where a recipe states it, and who has none.
ROLES = {
    "teacher": ("teacher", "teacher.licence", "it was distilled from no other model"),
    "base_model": ("base model", "students.NAME.licence", "it began as no pretrained model"),
    "data": ("data", "data.licence", "no training text is recorded of it"),
}


def lineage(asked: LineageRules, evidence: Evidence) -> Iterator[RuleResult]:
    """What the rules on lineage say."""
    version, card = evidence.version, evidence.card
    if asked.require_distillation_licence:
        yield _distillation(evidence)
    if asked.max_contamination is None or card is None or card.artifact != version.digest:
        return
    name, found = "lineage.max_contamination", card.contamination
    if found is None:
        words = "its overlap with the training text has not been measured"
        yield rule(name, "inconclusive", f"{words}; run limbeck eval {version.ref} where that text lies")
        return
    for task, overlap in found.tasks.items():
        words = f"{overlap.contaminated} of {overlap.documents} documents of {task} occur in the training text"
        words += f" ({overlap.share:.4f}), at most {asked.max_contamination:.4f} is asked"
        yield rule(f"{name}.{task}", "pass" if overlap.share <= asked.max_contamination else "fail", words)


def _distillation(evidence: Evidence) -> RuleResult:
    name, teachers = "lineage.require_distillation_licence", _terms(evidence, "teacher")
    if not teachers:
        return rule(name, "pass", "it was distilled from no other model")
    if forbidding := [term for term in teachers if term.allows is False]:
        words = "; ".join(f"to learn from {term.of}: its licence forbids it{_named(term)}" for term in forbidding)
        return rule(name, "fail", words)
    if unknown := [term.of for term in teachers if term.allows is None]:
        words = "; ".join(f"whether the licence of {of} lets a student learn from it is not known" for of in unknown)
        fix = "say so in the recipe: teacher.licence_allows_distillation, and distil again"
        return rule(name, "inconclusive", f"{words}; {fix}")
    words = ", ".join(dict.fromkeys(term.of for term in teachers))
    return rule(name, "pass", f"to learn from {words}: the licence allows it")


def licence(asked: LicenceRules, evidence: Evidence) -> Iterator[RuleResult]:
    """What the rules on licences say."""
    for kind, (role, key, none) in ROLES.items():
        allowed = getattr(asked, kind)
        if allowed is None:
            continue
        terms = _terms(evidence, role)
        if not terms:
            yield rule(f"licence.{kind}", "pass", none)
        for term in terms:
            what = (
                f"the training text of {term.version}"
                if role == "data"
                else f"{term.of}, the {role} of {term.version},"
            )
            yield _allowed(f"licence.{kind}", what, term.licence, allowed, key)
    if asked.code is not None:
        yield _allowed(
            "licence.code", "the code that made it", evidence.version.code_licence, asked.code, "code_licence"
        )


def _allowed(name: str, what: str, stated: str | None, allowed: tuple[str, ...], key: str) -> RuleResult:
    within = licences.within(stated, allowed)
    if within is None:
        return rule(name, "inconclusive", f"the licence of {what} is not known; say it in the recipe: {key}")
    words = f"{what} is under {stated}, allowed {'are' if len(allowed) > 1 else 'is'} {', '.join(allowed)}"
    return rule(name, "pass" if within else "fail", words)


def _terms(evidence: Evidence, role: str) -> list[Term]:
    """The terms of a role; those of a teacher that the lineage says nothing about are not known."""
    version = evidence.version
    terms = [term for term in evidence.terms if term.role == role]
    if not terms and role == "teacher" and version.teacher is not None:
        allows = version.licence_allows_distillation
        terms = [Term("teacher", version.ref, version.teacher, version.teacher_licence, allows)]
    if not terms and role == "data" and version.kind != "teacher":
        terms = [Term("data", version.ref, "", version.data_licence, None)]
    return terms


def _named(term: Term) -> str:
    known = licences.terms(term.licence)
    return f" ({term.licence}: {known.said})" if term.licence and known and not known.allows else ""
