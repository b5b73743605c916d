"""The students of a recipe: sizes x objectives x temperatures x seeds, and their controls."""

from __future__ import annotations

from limbeck.distill.recipe.schema import Control, Objective, Recipe
from limbeck.registry.records import Record


class Plan(Record):
    """One student to train: a size, an objective (its temperature filled in) and a seed."""

    label: str
    student: str
    objective_name: str
    objective: Objective
    seed: int
    control: Control | None = None


def plans(recipe: Recipe) -> list[Plan]:
    """Every student under every objective, temperature and seed, each size and seed followed by its controls.

    What does not vary is left out of the labels.
    """
    made: list[Plan] = []
    for student in recipe.students:
        for seed in recipe.sweep.seeds or (recipe.seed,):
            made += _family(recipe, student, seed)
    return made


def _family(recipe: Recipe, student: str, seed: int) -> list[Plan]:
    """The students of one size and seed, those that learn from the teacher first: controls are measured by them."""
    learns = any(objective.uses_teacher for objective in recipe.objectives.values())
    alone = [name for name, objective in recipe.objectives.items() if not objective.uses_teacher]
    controls = [control for control in recipe.sweep.controls if control != "labels" or not alone]

    def plan(name: str, objective: Objective, control: Control | None = None, varies: str = "") -> Plan:
        named = name if len(recipe.objectives) + len(controls) > 1 else ""
        seeded = f"s{seed}" if len(recipe.sweep.seeds) > 1 else ""
        return Plan(
            label="-".join(filter(None, [student, named.replace("_", "-") if control else named, varies, seeded])),
            student=student,
            objective_name=name,
            objective=objective,
            seed=seed,
            control=control,
        )

    made = []
    for name, objective in recipe.objectives.items():
        temperatures = recipe.sweep.temperatures if objective.divergence else ()
        for temperature in temperatures or (objective.temperature,):
            varies = f"t{temperature:g}" if len(temperatures) > 1 else ""
            # Under [generate] the teacher wrote the labels, and learning from them is distillation.
            control: Control | None = "labels" if name in alone and learns and not recipe.generate else None
            made.append(plan(name, objective.model_copy(update={"temperature": temperature}), control, varies))
    made += [plan(control, Objective(labels=1.0), control) for control in controls]
    return sorted(made, key=lambda each: _ORDER.index(each.control))


_ORDER: tuple[Control | None, ...] = (None, "labels", "untrained", "labels_equal_cost")
