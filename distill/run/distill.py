"""Runs a whole recipe: text, teacher, cache, then trains, logs and registers each student."""

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
from limbeck.distill.students import licences as student_licences
from limbeck.distill.students import student
from limbeck.distill.students.keys import checkpoint_folder, student_key
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

Begin = Literal["continue", "resume", "restart"]


class Student(NamedTuple):
    """One student of a recipe: its registered version, and whether this run trained it."""

    plan: Plan
    version: Version
    trained: bool


class SomeStudentsFailed(Refused):
    """Some students of a sweep failed, and the others are registered (exit code 1).

    Args:
        failed: the reasons by label.
        made: the others.
    """

    def __init__(self, failed: dict[str, str], made: list[Student]) -> None:
        reasons = "".join(f"\n  {label}: {reason}" for label, reason in failed.items())
        super().__init__(
            f"{len(failed)} of {len(failed) + len(made)} students were not made:{reasons}",
            fix="the others are registered; the same command makes the missing ones",
        )
        self.made = made


def distill(
    path: Path,
    overrides: list[str],
    store: Store,
    output_folder: Path | None = None,
    *,
    begin: Begin = "continue",
    ray: str | None = None,
    yes: bool = False,
) -> list[Student]:
    """Run the recipe at `path`; skips students that were already made with the same key.

    Args:
        path: of the recipe, TOML.
        overrides: `KEY=VALUE`, applied before the recipe is checked.
        output_folder: also copy the student's files there, replacing a model; only for a recipe of one student.
        begin: "continue" an earlier run if there is one; "resume" one that must exist; "restart" from nothing.
        ray: the address of the Ray cluster that makes the students, or "local" to start one here.
        yes: confirm all findings that need confirmation.

    Raises:
        BadInput: anything wrong with the recipe, its text, its teacher or its students; before any training.
        SomeStudentsFailed: some students of a sweep failed, after all others were made.
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
    students = {} if begin == "restart" else _registered_students(setting, plans, keys, store)
    missing = [plan for plan in plans if plan.label not in students]
    _begin(begin, setting, [keys[plan.label] for plan in missing], bool(students))
    if not recipe.generate:
        confirm_findings(preflight(setting, missing), yes)
    _make_students(setting, missing, keys, store, students, ray)
    made = [students[plan.label] for plan in plans]
    if output_folder is not None:
        with atomic_write(output_folder) as temporary:
            shutil.copytree(store.artifacts.verified_folder(made[0].version), temporary)
    return made


def _check_output_folder(output_folder: Path | None, plans: list[Plan], path: Path) -> None:
    if output_folder is not None and len(plans) != 1:
        raise BadInput(f"--output takes one student, and {path} makes {len(plans)}", fix="leave --output out")
    if output_folder is not None and output_folder.exists() and not (output_folder / "config.json").exists():
        raise BadInput(
            f"--output {output_folder} exists and is not a model", fix="give a folder that does not exist yet"
        )


def _registered_students(setting: Setting, plans: list[Plan], keys: dict[str, str], store: Store) -> dict[str, Student]:
    """The students that are already registered, by label."""
    students = {}
    for plan in plans:
        if version := store.find_version(setting.recipe.name, engine="torch", recipe_digest=keys[plan.label]):
            print_status(f"  {plan.label}: already made, {version.ref}")
            licences.fill_missing_fields(store, version, student_licences.licence_fields(setting, plan))
            students[plan.label] = Student(plan, store.get(version.ref), trained=False)
    return students


def _begin(begin: Begin, setting: Setting, missing_keys: list[str], some_registered: bool) -> None:
    """Remove checkpoints for "restart", else report them. Raises BadInput for "resume" without an earlier run."""
    folders = [folder for folder in map(checkpoint_folder, missing_keys) if folder.is_dir()]
    if begin == "restart":
        for folder in folders:
            shutil.rmtree(folder)
        return
    if begin == "resume" and not (folders or some_registered or setting.generated):
        raise BadInput(
            f"--resume: {home()} has no earlier run of {setting.source.path} as the recipe is now",
            fix="leave --resume out to begin; a changed recipe, text or --set makes other students",
        )
    if with_checkpoint := [folder for folder in folders if any(folder.glob("checkpoint-*"))]:
        print_status(f"  resuming from checkpoints: {len(with_checkpoint)} of {len(missing_keys)} students")


def _make_students(
    setting: Setting,
    missing: list[Plan],
    keys: dict[str, str],
    store: Store,
    students: dict[str, Student],
    ray: str | None,
) -> None:
    """Run the teacher once, then make each missing student and add it to `students`. Raises SomeStudentsFailed."""
    is_sweep = len(keys) > 1

    def on_made(plan: Plan, version: Version) -> None:
        students[plan.label] = Student(plan, version, trained=True)

    with ExitStack() as stack:
        nodes = stack.enter_context(ray_workers.ray_cluster(ray, setting, store)) if ray is not None and missing else []
        setting = with_registered_teacher(setting, store)
        for plan in missing:  # --resume finds these folders, even if the run is killed before the first checkpoint
            checkpoint_folder(keys[plan.label]).mkdir(parents=True, exist_ok=True)
        parent_run = stack.enter_context(_sweep_run(setting, keys, store)).id if is_sweep and missing else None
        teachers = teachers_for(setting, missing) if missing else {}
        distributed.broadcast_to_workers([plan.label for plan in missing])
        if nodes:
            teachers.clear()  # the Ray tasks load their own
            failed = ray_workers.make_students(TaskInput(setting, missing, keys, parent_run), nodes, on_made)
        else:

            def make(plan: Plan) -> Version:
                return student.make_student(
                    setting, plan, keys[plan.label], teachers.get(plan.label), store, parent_run
                )

            failed = _make_in_order(missing, make, on_made, raise_first_error=not is_sweep)
        if failed:
            raise SomeStudentsFailed(failed, [students[label] for label in keys if label in students])


@contextmanager
def _sweep_run(setting: Setting, keys: dict[str, str], store: Store) -> Iterator[Run]:
    """The MLflow run that is the parent of the students' runs."""
    with store.runs.start_or_resume_sweep(f"{setting.recipe.name} sweep", json_digest(sorted(keys.values()))) as run:
        run.log_artifact(setting.source.path, "recipe")
        yield run


def _make_in_order(
    plans: list[Plan],
    make: Callable[[Plan], Version],
    on_made: Callable[[Plan, Version], None],
    raise_first_error: bool,
) -> dict[str, str]:
    """Make students one after another; goes on after an error unless `raise_first_error`.

    Returns:
        The reasons of the failed students, by label.
    """
    failed: dict[str, str] = {}
    for plan in plans:
        try:
            on_made(plan, make(plan))
        except Exception as error:
            if raise_first_error or distributed.world_size() > 1:  # the workers are still in this training
                raise
            failed[plan.label] = format_error(plan, error)
            print_status(f"  {plan.label}: failed: {failed[plan.label]}")
    return failed
