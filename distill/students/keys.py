"""The identity of a student: a digest of everything that decides its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.distill.context import Setting
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.schema import Recipe
from limbeck.distill.students import matching
from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.home import home


def family_key(setting: Setting, plan: Plan) -> str:
    """The digest of what a student shares with its controls: initial model, text and layout, training, seed."""
    recipe = setting.recipe
    student = recipe.students[plan.student]
    start = student.model_dump(exclude={"training", "licence"})
    if plan.student in setting.base_models:
        start["model"] = setting.base_models[plan.student].digest
    elif student.prune:
        start["model"] = setting.teacher.digest if setting.teacher else None
    return json_digest(
        {
            "student": start,
            "training": recipe.training_of(plan.student).model_dump(
                exclude={"logging_steps", "save_minutes", "eval_steps"}
            ),
            "seed": plan.seed,
            "blocks": setting.train.digest,
            "tokenizer": recipe.tokenizer.model_dump() if recipe.tokenizer else None,
        }
    )


def student_key(setting: Setting, plan: Plan) -> str:
    """The digest of everything that decides a student's weights: its part of the recipe, the data, the teacher."""
    recipe = setting.recipe
    uses_teacher = plan.objective.uses_teacher
    matched = matching.plans_to_match(recipe, plan)
    return json_digest(
        {
            "family": family_key(setting, plan),
            "objective": plan.objective.model_dump(),
            "budget": _budget(recipe, plan),
            "teacher": setting.teacher.digest if setting.teacher and uses_teacher else None,
            "cache": recipe.cache.model_dump() if uses_teacher else None,
            "on_policy": recipe.on_policy.model_dump() if recipe.on_policy and uses_teacher else None,
            # Labels at equal tokens are the same student as an objective of labels alone in the recipe.
            "control": plan.control if plan.control != "labels" else None,
            "matches": [student_key(setting, other) for other in matched],
        }
    )


def _budget(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The part of the budget that decides a student's weights; a price alone does not."""
    priced = recipe.budget.max_usd or recipe.budget.stop_when or plan.control == "labels_equal_cost"
    return recipe.budget.model_dump(exclude=None if priced else {"usd_per_hour"})


def checkpoint_folder(key: str) -> Path:
    """The folder of a student's checkpoints until it is registered."""
    return home() / "runs" / key[:16]
