"""The students that a recipe makes: sizes x objectives x temperatures x seeds, and their controls."""

from __future__ import annotations

from limbeck.distill.recipe.schema import Control, Objective, Recipe
from limbeck.registry.records import Record


class Plan(Record):
    """One student to train: a size, an objective (with its temperature) and a seed."""

    label: str
    student: str
    objective_name: str
    objective: Objective
    seed: int
    control: Control | None = None


def plan_students(recipe: Recipe) -> list[Plan]:
    """A plan for every size, objective, temperature and seed; the controls come last for each size and seed.

    A label names only what varies.
    """
    plans: list[Plan] = []
    for student in recipe.students:
        for seed in recipe.sweep.seeds or (recipe.seed,):
            plans += _plan_family(recipe, student, seed)
    return plans


def _plan_family(recipe: Recipe, student: str, seed: int) -> list[Plan]:
    """The plans of one size and seed. Distilled students come first, since controls are compared with them."""
    distills = any(objective.uses_teacher for objective in recipe.objectives.values())
    labels_only = [name for name, objective in recipe.objectives.items() if not objective.uses_teacher]
    controls = [control for control in recipe.sweep.controls if control != "labels" or not labels_only]

    def plan(name: str, objective: Objective, control: Control | None = None, temperature_part: str = "") -> Plan:
        objective_part = name if len(recipe.objectives) + len(controls) > 1 else ""
        if control:
            objective_part = objective_part.replace("_", "-")
        seed_part = f"s{seed}" if len(recipe.sweep.seeds) > 1 else ""
        return Plan(
            label="-".join(filter(None, [student, objective_part, temperature_part, seed_part])),
            student=student,
            objective_name=name,
            objective=objective,
            seed=seed,
            control=control,
        )

    plans = []
    for name, objective in recipe.objectives.items():
        temperatures = recipe.sweep.temperatures if objective.divergence else ()
        for temperature in temperatures or (objective.temperature,):
            temperature_part = f"t{temperature:g}" if len(temperatures) > 1 else ""
            # With [generate] the teacher wrote the labels, and learning from them is distillation.
            is_control = name in labels_only and distills and not recipe.generate
            control: Control | None = "labels" if is_control else None
            at_temperature = objective.model_copy(update={"temperature": temperature})
            plans.append(plan(name, at_temperature, control, temperature_part))
    plans += [plan(control, Objective(labels=1.0), control) for control in controls]
    return sorted(plans, key=lambda each: _ORDER.index(each.control))


_ORDER: tuple[Control | None, ...] = (None, "labels", "untrained", "labels_equal_cost")
