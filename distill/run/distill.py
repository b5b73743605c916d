"""A whole recipe: text, teacher, cache, then each student trained, logged and registered."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from limbeck.distill.context import Setting
from limbeck.distill.recipe import grid, load
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.load import Source
from limbeck.distill.run import ray as ray_workers
from limbeck.distill.run.preflight import confirm_findings, preflight
from limbeck.distill.run.prepare import prepare_setting, with_generated_text, with_registered_teacher
from limbeck.distill.run.ray import TaskInput
from limbeck.distill.students import keys as keys_module
from limbeck.distill.students import licences as terms
from limbeck.distill.students import student
from limbeck.distill.students.keys import student_key
from limbeck.distill.students.student import format_error
from limbeck.distill.teacher.signal import teachers_for
from limbeck.distill.training import distributed
from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.terminal import print_status
from limbeck.registry.mlflow.store import Store
from limbeck.registry.provenance import licences
from limbeck.registry.records import Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.runs import Run

Begin = Literal["go on", "resume", "restart"]


class Student(NamedTuple):
    """One student of a recipe: its registered version, and whether this run trained it."""

    plan: Plan
    version: Version
    trained: bool


class SomeFailed(Refused):
    """Students of a sweep that were not made; the others were (exit code 1)."""

    def __init__(self, failed: dict[str, str], made: list[Student]) -> None:
        reasons = "".join(f"\n  {label}: {why}" for label, why in failed.items())
        super().__init__(
            f"{len(failed)} of {len(failed) + len(made)} students were not made:{reasons}",
            fix="the others are registered; the same command makes those that are missing",
        )
        self.made = made


def distill(
    path: Path,
    overrides: list[str],
    store: Store,
    output_folder: Path | None = None,
    *,
    begin: Begin = "go on",
    ray: str | None = None,
    yes: bool = False,
) -> list[Student]:
    """Carry out the recipe at `path`; students already made from the same ingredients are skipped.

    Args:
        path: the recipe, TOML.
        overrides: `KEY=VALUE`, put in before the recipe is checked.
        output_folder: also copy the student's files there (a recipe with one student); replaces a model there.
        begin: "go on" from what is there; "resume": the same, and there has to be something; "restart": anew.
        ray: the address of a Ray cluster that makes the students, or "local" to begin one here.
        yes: go on where what is odd has to be confirmed.

    Raises:
        BadInput: anything wrong with the recipe, its text, its teacher or its students; before any training.
        SomeFailed: a sweep of which some students could not be made, after all others were.
    """
    recipe = load.load_recipe(path, overrides)
    plans = grid.plan_students(recipe)
    distributed.check()
    _check_output_folder(output_folder, plans, path)
    setting = prepare_setting(recipe, Source(path, tuple(overrides)), store)
    if recipe.generate:  # before the teacher writes
        confirm_findings(preflight(setting, plans), yes)
    setting = with_generated_text(setting)
    keys = {plan.label: student_key(setting, plan) for plan in plans}
    students = {} if begin == "restart" else _made_before(setting, plans, keys, store)
    missing = [plan for plan in plans if plan.label not in students]
    _begin(begin, setting, [keys[plan.label] for plan in missing], bool(students))
    if not recipe.generate:
        confirm_findings(preflight(setting, missing), yes)
    _carry_out(setting, missing, keys, store, students, ray)
    made = [students[plan.label] for plan in plans]
    if output_folder is not None:
        with atomic_write(output_folder) as temporary:
            shutil.copytree(store.artifacts.verified_folder(made[0].version), temporary)
    return made


def _check_output_folder(output_folder: Path | None, plans: list[Plan], path: Path) -> None:
    if output_folder is not None and len(plans) != 1:
        raise BadInput(f"--to takes one student and {path} makes {len(plans)}", fix="leave --to out")
    if output_folder is not None and output_folder.exists() and not (output_folder / "config.json").exists():
        raise BadInput(f"--to {output_folder} is there and is no model", fix="give a folder that is not there yet")


def _made_before(setting: Setting, plans: list[Plan], keys: dict[str, str], store: Store) -> dict[str, Student]:
    students = {}
    for plan in plans:
        if there := store.find_version(setting.recipe.name, engine="torch", recipe_digest=keys[plan.label]):
            print_status(f"  {plan.label}: already made, {there.ref}")
            licences.fill_missing_licences(store, there, terms.licence_fields(setting, plan))
            students[plan.label] = Student(plan, store.get(there.ref), trained=False)
    return students


def _begin(begin: Begin, setting: Setting, missing: list[str], some_made: bool) -> None:
    """Say what goes on, or drop it. Raises BadInput where there is nothing to resume."""
    folders = [keys_module.folder_of(key) for key in missing]
    begun = [folder for folder in folders if folder.is_dir()]
    if begin == "restart":
        for folder in begun:
            shutil.rmtree(folder)
        return
    if begin == "resume" and not (begun or some_made or setting.generated):
        raise BadInput(
            f"--resume: no student of {setting.source.path} has been begun, as the recipe is now, in {home()}",
            fix="leave --resume out to begin; a changed recipe, text or --set makes other students",
        )
    if going_on := [folder for folder in begun if any(folder.glob("checkpoint-*"))]:
        print_status(f"  going on from checkpoints: {len(going_on)} of {len(missing)} students")


def _carry_out(
    setting: Setting,
    missing: list[Plan],
    keys: dict[str, str],
    store: Store,
    students: dict[str, Student],
    ray: str | None,
) -> None:
    """The teacher's part once, then each student that is missing, put into `students`. Raises SomeFailed."""
    sweep = len(keys) > 1

    def on_made(plan: Plan, version: Version) -> None:
        students[plan.label] = Student(plan, version, trained=True)

    with ExitStack() as stack:
        nodes = stack.enter_context(ray_workers.ray_cluster(ray, setting, store)) if ray is not None and missing else []
        setting = with_registered_teacher(setting, store)
        for plan in missing:  # a mark that --resume finds, whatever is cut short from here on
            keys_module.folder_of(keys[plan.label]).mkdir(parents=True, exist_ok=True)
        parent_run = stack.enter_context(_parent(setting, keys, store)).id if sweep and missing else None
        teachers = teachers_for(setting, missing) if missing else {}
        distributed.broadcast_to_workers([plan.label for plan in missing])
        if nodes:
            teachers.clear()  # a teacher that runs online runs on the workers
            failed = ray_workers.make_all(TaskInput(setting, missing, keys, parent_run), nodes, on_made)
        else:

            def make(plan: Plan) -> Version:
                return student.make_student(
                    setting, plan, keys[plan.label], teachers.get(plan.label), store, parent_run
                )

            failed = _make_in_order(missing, make, on_made, raises_at_once=not sweep)
        if failed:
            raise SomeFailed(failed, [students[label] for label in keys if label in students])


@contextmanager
def _parent(setting: Setting, keys: dict[str, str], store: Store) -> Iterator[Run]:
    """The MLflow run above those of a sweep's students."""
    with store.runs.start_or_resume_sweep(f"{setting.recipe.name} sweep", json_digest(sorted(keys.values()))) as run:
        run.log_artifact(setting.source.path, "recipe")
        yield run


def _make_in_order(
    plans: list[Plan], make: Callable[[Plan], Version], on_made: Callable[[Plan, Version], None], raises_at_once: bool
) -> dict[str, str]:
    """Make students one after the other; of a sweep, one that fails does not stop the others.

    Returns:
        Why, by label, of those that failed.
    """
    failed: dict[str, str] = {}
    for plan in plans:
        try:
            on_made(plan, make(plan))
        except Exception as error:
            if raises_at_once or distributed.world_size() > 1:  # of several processes the others are amid its training
                raise
            failed[plan.label] = format_error(plan, error)
            print_status(f"  {plan.label}: failed: {failed[plan.label]}")
    return failed
