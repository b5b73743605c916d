"""The findings of a preflight, and the plans that its checks are about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from limbeck.registry.core.errors import LimbeckError
from limbeck.registry.records import Record

if TYPE_CHECKING:
    from limbeck.distill.context import Setting
    from limbeck.distill.recipe.grid import Plan

Level = Literal["ok", "warning", "error"]


class Finding(Record):
    """One entry of `limbeck distill RECIPE --check --format json`."""

    check: str
    level: Level
    message: str
    fix: str | None = None
    needs_confirmation: bool = False  # a run needs --yes, or a yes in the terminal


def ok(name: str, message: str) -> Finding:
    return Finding(check=name, level="ok", message=message)


def error_finding(name: str, error: LimbeckError) -> Finding:
    return Finding(check=name, level="error", message=error.message, fix=error.fix)


def one_plan_per_student(plans: list[Plan]) -> dict[str, Plan]:
    """The first plan of each [students.NAME], by name."""
    first: dict[str, Plan] = {}
    for plan in plans:
        first.setdefault(plan.student, plan)
    return first


def plans_using_teacher(setting: Setting, plans: list[Plan]) -> list[Plan]:
    """The plans that learn from the teacher's distribution or from its text."""
    return [plan for plan in plans if plan.objective.uses_teacher or (setting.recipe.generate and not plan.control)]
