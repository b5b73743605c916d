"""Checks between the keys of a recipe; `schema` checks each key on its own."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.distill.recipe.cache_form import reason_no_form_fits
from limbeck.distill.recipe.schema import Recipe
from limbeck.registry.core.toml import Problem


def find_problems(recipe: Recipe) -> Iterator[Problem]:
    """The keys of a recipe that do not fit together. Every key alone must be valid already."""
    yield from _check_teacher(recipe)
    if recipe.crosses_tokenizers:
        yield from _check_tokenizers(recipe)
    if recipe.on_policy:
        yield from _check_on_policy(recipe)
    yield from _check_controls(recipe)


def _objectives_with_teacher(recipe: Recipe) -> list[str]:
    return [name for name, objective in recipe.objectives.items() if objective.uses_teacher]


def _pruned_student(recipe: Recipe) -> str | None:
    return next((name for name, student in recipe.students.items() if student.prune), None)


def _check_teacher(recipe: Recipe) -> Iterator[Problem]:
    teacher = recipe.teacher
    for name in _objectives_with_teacher(recipe):
        place = ("objectives", name)
        if teacher is None:
            yield Problem(f"objectives.{name} has a divergence but the recipe has no [teacher]", (place,))
            continue
        for temperature in (recipe.objectives[name].temperature, *recipe.sweep.temperatures):
            objective = recipe.objectives[name].model_copy(update={"temperature": temperature})
            if reason := reason_no_form_fits(recipe.cache, objective, teacher.is_endpoint):
                yield Problem(f"objectives.{name}: {reason}", (place,))
                break
    if recipe.generate and teacher is None:
        message = "[generate] needs a teacher to write the answers, and the recipe has no [teacher]"
        yield Problem(message, (("generate",),))
    if recipe.tokenizer and teacher and not recipe.crosses_tokenizers:
        yield Problem(
            "[tokenizer] with a [teacher] needs an objective that compares across tokenizers: leave [tokenizer] out, "
            "and the students use the teacher's, or set teacher.retokenize = true",
            (("tokenizer",),),
        )
    pruned = _pruned_student(recipe)
    if pruned and (teacher is None or teacher.is_endpoint):
        message = f"students.{pruned}.prune makes the student from the teacher: [teacher] must be a local model"
        yield Problem(message, (("students", pruned, "prune"),))


def _check_tokenizers(recipe: Recipe) -> Iterator[Problem]:
    """Problems of a recipe whose students may have other tokens than the teacher."""
    teacher = recipe.teacher
    if teacher is None:
        return
    for name in _objectives_with_teacher(recipe):
        objective = recipe.objectives[name]
        if objective.layers or (objective.divergence != "chunks" and not teacher.retokenize):
            yield Problem(
                f"objectives.{name} compares token by token, and the students may have other tokens than the "
                f"teacher: put it in a recipe of its own, or leave its layers out and set teacher.retokenize = true",
                (("objectives", name),),
            )
    if teacher.retokenize and teacher.is_endpoint:
        yield Problem(
            "teacher.retokenize needs the teacher's whole distribution, and an endpoint returns only its most likely "
            'tokens: set divergence = "chunks", which needs only the log-probabilities of the text',
            (("teacher", "retokenize"),),
        )
    if teacher.retokenize and (recipe.on_policy or recipe.cache.form == "online"):
        message = 'teacher.retokenize runs before the training: leave [on_policy] and cache.form = "online" out'
        yield Problem(message, (("teacher", "retokenize"),))
    if recipe.tokenizer and recipe.generate:
        message = "[tokenizer] needs existing text, and with [generate] the teacher has yet to write it: leave one out"
        yield Problem(message, (("tokenizer",), ("generate",)))
    pruned = _pruned_student(recipe)
    if pruned and (recipe.tokenizer or any(student.model for student in recipe.students.values())):
        message = f"students.{pruned}.prune has the teacher's tokens, and the other students have their own"
        yield Problem(message, (("students", pruned, "prune"),))


def _check_on_policy(recipe: Recipe) -> Iterator[Problem]:
    place = ("on_policy",)
    if not _objectives_with_teacher(recipe):
        message = "[on_policy] lets the teacher grade what the student writes, and no objective uses a teacher"
        yield Problem(message, (place,))
    if recipe.teacher is not None and recipe.teacher.is_endpoint:
        message = "[on_policy]: an endpoint cannot grade the text of each step: [teacher] must be a local model"
        yield Problem(message, (place,))
    if recipe.cache.form not in (None, "online"):
        yield Problem(
            f"[on_policy]: the student writes text that is in no cache, and cache.form is {recipe.cache.form!r}: "
            f'set cache.form = "online", or leave it out',
            (place, ("cache", "form")),
        )
    for name, objective in recipe.objectives.items():
        if objective.divergence == "chunks":
            yield Problem(
                f"[on_policy]: objectives.{name}.divergence chunks needs the original text, and the student writes "
                f"new text: choose another divergence",
                (("objectives", name),),
            )
        if objective.layers and not objective.divergence:
            message = f"[on_policy]: objectives.{name} has no divergence to grade what the student writes"
            yield Problem(message, (("objectives", name),))


def _check_controls(recipe: Recipe) -> Iterator[Problem]:
    sweep, place = recipe.sweep, ("sweep", "controls")
    if sweep.temperatures and not any(objective.divergence for objective in recipe.objectives.values()):
        message = "sweep.temperatures: no objective has a divergence, and only those have a temperature"
        yield Problem(message, (("sweep", "temperatures"),))
    labels = next((control for control in sweep.controls if control != "untrained"), None)
    if labels and not _objectives_with_teacher(recipe):
        yield Problem(
            f"sweep.controls {labels!r} is a control for distillation, and no objective learns from the teacher's "
            f"distribution: leave it out",
            (place,),
        )
    if labels and recipe.generate:
        yield Problem(
            f"sweep.controls {labels!r} learns from labels without the teacher, and with [generate] the teacher "
            f"writes them: leave it out, or train the control with a recipe of its own over the original text",
            (place,),
        )
    if "labels_equal_cost" in sweep.controls:
        yield from _check_equal_cost(recipe)
    for control in sweep.controls:
        if control in recipe.objectives and recipe.objectives[control].uses_teacher:
            message = f"objectives.{control} has the name of a control: choose another name"
            yield Problem(message, (("objectives", control),))


def _check_equal_cost(recipe: Recipe) -> Iterator[Problem]:
    place = ("sweep", "controls")
    labels_only = any(not objective.uses_teacher for objective in recipe.objectives.values())
    if "labels" not in recipe.sweep.controls and not labels_only:
        message = 'sweep.controls "labels_equal_cost" takes its speed from "labels": put both in sweep.controls'
        yield Problem(message, (place,))
    if recipe.teacher and recipe.teacher.usd(10**6, 10**6) and not recipe.budget.usd_per_hour:
        yield Problem(
            'sweep.controls "labels_equal_cost" spends the price of the endpoint on training, and needs the price of '
            "an hour of this machine: set budget.usd_per_hour",
            (place,),
        )
