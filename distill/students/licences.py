"""The licences of a student: of its teacher, its text and its base model, and of everything these were made from."""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.distill.data import corpus
from limbeck.registry.catalog import model_licence
from limbeck.registry.core.errors import BadInput
from limbeck.registry.provenance import licences
from limbeck.registry.provenance.licences import LineageLicence

if TYPE_CHECKING:
    from limbeck.distill.context import Setting
    from limbeck.distill.recipe.grid import Plan
    from limbeck.distill.recipe.schema import Data


def learns_from_teacher(setting: Setting, plan: Plan) -> bool:
    """Whether a student is made from the teacher: from its distribution, its text or its weights."""
    recipe = setting.recipe
    uses_text = recipe.generate is not None and plan.control is None
    return plan.objective.uses_teacher or uses_text or recipe.students[plan.student].prune is not None


def licences_allow_distillation(setting: Setting) -> bool | None:
    """Whether the licences of the teacher and of its own teachers allow distillation; None: unknown, or no teacher."""
    if setting.recipe.teacher is None:
        return None
    return licences.all_allow(
        [setting.teacher_licence_allows, *(t.allows_distillation for t in _teacher_terms(setting) if t.role != "data")]
    )


def teacher_licences(setting: Setting) -> str | None:
    """The licences of the teacher and of its own teachers as one SPDX expression; None if none is stated."""
    return licences.join_licences(
        [setting.teacher_licence, *(t.licence for t in _teacher_terms(setting) if t.role != "data")]
    )


def text_licence(data: Data, recipe_folder: Path) -> str | None:
    """The licence of a recipe's text: from the recipe, else from the data set's card on this machine; None: unknown."""
    if data.licence or data.kind != "dataset":
        return data.licence
    try:
        path = Path(corpus.locate_data(data, recipe_folder))
    except BadInput:  # reading the text raises it again
        return None
    if path.exists():
        return model_licence.licence_of_card(path if path.is_dir() else path.parent)
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(str(data.path), "README.md", repo_type="dataset")
    except ValueError:  # not a valid name on the hub
        return None
    return model_licence.licence_of_card(Path(found).parent) if isinstance(found, str) else None


def licence_fields(setting: Setting, plan: Plan) -> dict[str, Any]:
    """The licence fields of a student's `Version`; without the teacher's if the student does not learn from it."""
    from_teacher, base = learns_from_teacher(setting, plan), setting.base_models.get(plan.student)
    base_terms = setting.inherited_terms.get(base.label, ()) if base else ()
    all_terms = [*(_teacher_terms(setting) if from_teacher else ()), *base_terms]
    text = text_licence(setting.recipe.data, setting.source.path.resolve().parent)
    teachers = [
        teacher_licences(setting) if from_teacher else None,
        *(t.licence for t in base_terms if t.role != "data"),
    ]
    fields: dict[str, Any] = {
        "licence_allows_distillation": licences.all_allow(
            [
                licences_allow_distillation(setting) if from_teacher else True,
                *(t.allows_distillation for t in base_terms if t.role == "teacher"),
            ]
        ),
        "teacher_licence": licences.join_licences(teachers),
        "data_licence": licences.join_licences([text, *(t.licence for t in all_terms if t.role == "data")]),
        "code_licence": metadata("limbeck")["License-Expression"],
    }
    if base is not None:
        stated = setting.recipe.students[plan.student].licence or model_licence.licence_of_model(base)
        fields |= {"base_model": base.label, "base_model_digest": base.digest, "base_model_licence": stated}
    return fields


def _teacher_terms(setting: Setting) -> tuple[LineageLicence, ...]:
    return setting.inherited_terms.get(setting.teacher.label, ()) if setting.teacher else ()
