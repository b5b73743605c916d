"""Finds the students that a control is matched with."""

from __future__ import annotations

from limbeck.distill.recipe import grid
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.schema import Recipe


def plans_to_match(recipe: Recipe, plan: Plan) -> list[Plan]:
    """The plans, of the same size and seed, whose training decides how long a control trains.

    For labels at equal cost, these are the distilled students and the labels at equal tokens. For labels at equal
    tokens, these are the distilled students if time or money ends their training, since only the run shows when.
    All other plans are matched with none.
    """
    family = [p for p in grid.plan_students(recipe) if (p.student, p.seed) == (plan.student, plan.seed)]
    budget = recipe.budget
    if plan.control == "labels_equal_cost":
        return [p for p in family if p.control in (None, "labels")]
    if plan.control == "labels" and (budget.max_minutes or budget.max_usd or budget.stop_when):
        return [p for p in family if p.control is None]
    return []
