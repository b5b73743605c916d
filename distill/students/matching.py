"""Match a control with the student it belongs to."""

from __future__ import annotations

from limbeck.distill.recipe import grid
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.schema import Recipe


def plans_to_match(recipe: Recipe, plan: Plan) -> list[Plan]:
    """The plans that a control's length is taken from, of its own size and seed.

    Of labels at equal cost: the distilled students and the labels at equal tokens. Of labels at equal tokens: the
    distilled students where time or money ends their training, which only the run tells. Of others: none.
    """
    family = [p for p in grid.plan_students(recipe) if (p.student, p.seed) == (plan.student, plan.seed)]
    budget = recipe.budget
    if plan.control == "labels_equal_cost":
        return [p for p in family if p.control in (None, "labels")]
    if plan.control == "labels" and (budget.max_minutes or budget.max_usd or budget.stop_when):
        return [p for p in family if p.control is None]
    return []
