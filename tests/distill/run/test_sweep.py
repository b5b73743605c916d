"""A sweep: its grid and labels, its MLflow run, failed students, --resume and --restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.distill import context
from limbeck.distill.recipe import grid
from limbeck.distill.recipe import load as load_module
from limbeck.registry.mlflow.store import Store
from tests.distill.conftest import DISTILLED, STUDENTS

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]


def labels(path: Path, *overrides: str) -> list[str]:
    return [plan.label for plan in grid.plan_students(load_module.load_recipe(path, list(overrides)))]


def test_the_grid_is_sizes_by_objectives_by_temperatures_by_seeds(write_recipe: WriteRecipe, tiny_llama: Path) -> None:
    other = f"[students.other.config]\n{STUDENTS['gpt2']}\n"
    both = DISTILLED + '[objectives.jsd]\ndivergence = "jsd"\n[objectives.text]\nlabels = 1.0\n'
    path = write_recipe(tiny_llama, objectives=both, extra=other)
    sets = ("cache.form=online", "sweep.temperatures=[1, 2.5]", "sweep.seeds=[3, 4]", "sweep.controls=['untrained']")
    plans = grid.plan_students(load_module.load_recipe(path, list(sets)))
    assert len(plans) == 2 * 2 * (2 * 2 + 1 + 1)
    assert len({plan.label for plan in plans}) == len(plans)
    assert [plan.label for plan in plans[:6]] == [
        "small-distilled-t1-s3",
        "small-distilled-t2.5-s3",
        "small-jsd-t1-s3",
        "small-jsd-t2.5-s3",
        "small-text-s3",
        "small-untrained-s3",
    ]
    assert [(p.objective.temperature, p.seed) for p in plans[6:8]] == [(1.0, 4), (2.5, 4)]
    assert [plan.control for plan in plans[:6]] == [None, None, None, None, "labels", "untrained"]
    assert {plan.objective.uses_teacher for plan in plans if plan.control} == {False}


def test_labels_show_only_what_varies(write_recipe: WriteRecipe, tiny_llama: Path) -> None:
    path = write_recipe(tiny_llama, objectives=DISTILLED)
    assert labels(path) == ["small"]
    assert labels(path, "sweep.seeds=[7]", "sweep.temperatures=[1.0]") == ["small"]
    assert labels(path, "sweep.seeds=[7, 8]") == ["small-s7", "small-s8"]
    assert labels(path, "sweep.controls=['labels', 'labels_equal_cost']") == [
        "small-distilled",
        "small-labels",
        "small-labels-equal-cost",
    ]
    alone = write_recipe(tiny_llama, objectives=DISTILLED + "[objectives.plain]\nlabels = 1.0\n")
    assert labels(alone, "sweep.controls=['labels']") == ["small-distilled", "small-plain"]  # the recipe has it already


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["sweep.seeds=[1, 1]"], "sweep: seeds has a value twice: 1, 1"),
        (["sweep.temperatures=[0]"], "sweep.temperatures.0"),
        (["sweep.controls=['label']"], "did you mean 'labels'"),
        (["sweep.controls=['labels_equal_cost']"], 'takes its speed from "labels"'),
        (
            ["sweep.controls=['labels', 'labels_equal_cost']", "teacher.usd_per_million_output_tokens=9"],
            "set budget.usd_per_hour",
        ),
        (["sweep.controls=['labels']", "objectives.labels.divergence=jsd"], "objectives.labels has the name of a con"),
    ],
)
def test_mistakes_in_a_grid_are_reported(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, sets: list[str], message: str
) -> None:
    path = write_recipe(tiny_llama, objectives=DISTILLED)
    done = limbeck("distill", path, *(word for each in sets for word in ("--set", each)))
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert store.versions() == []


def test_controls_without_a_teacher_are_refused(store: Store, limbeck: Limbeck, write_recipe: WriteRecipe) -> None:
    done = limbeck("distill", write_recipe(), "--set", "sweep.controls=['labels']")
    assert done.code == 2
    assert "no objective learns from the teacher's distribution" in done.err
    done = limbeck("distill", write_recipe(), "--set", "sweep.temperatures=[2.0]")
    assert "no objective has a divergence, and only those have a temperature" in done.err


def test_a_sweep_runs_the_teacher_once_and_has_one_parent_run(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    load = context.load_model
    monkeypatch.setattr(context, "load_model", lambda path, *rest: loaded.append(Path(path)) or load(path, *rest))
    both = DISTILLED + '[objectives.jsd]\ndivergence = "jsd"\n'
    path = write_recipe(tiny_llama, objectives=both, extra="[cache]\nform = 'topk'\n[sweep]\nseeds = [1, 2]\n")
    done = limbeck("distill", path, "--format", "json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert [each["recipe"] for each in made] == [
        "small-distilled-s1",
        "small-jsd-s1",
        "small-distilled-s2",
        "small-jsd-s2",
    ]
    assert loaded == [tiny_llama]
    assert len({each["family"] for each in made}) == 2  # one per seed
    assert made[0]["family"] == made[1]["family"]

    [parent] = sweep_runs(store)
    assert parent.info.status == "FINISHED"
    children = store.client.search_runs(
        [store.runs.experiment_id()], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert {child.info.run_id for child in children} == {each["run_id"] for each in made}


def sweep_runs(store: Store) -> list[Any]:
    runs = store.client.search_runs([store.runs.experiment_id()])
    return [run for run in runs if "limbeck.sweep" in run.data.tags]


def test_a_failed_student_does_not_stop_the_others(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = f"[students.wild.config]\n{STUDENTS['llama']}\nrms_norm_eps = -10.0\n"
    last = f"[students.last.config]\n{STUDENTS['gpt2']}\n"
    path = write_recipe(extra=wild + last)
    done = limbeck("distill", path, "--format", "json")
    assert done.code == 1
    assert [each["recipe"] for each in json.loads(done.out)] == ["small", "last"]
    assert "1 of 3 students were not made:\n  wild: " in done.err
    assert "diverged" in done.err
    [parent] = sweep_runs(store)
    assert parent.info.status == "FAILED"

    # An unexpected error leaves its traceback in a file; the same parent run is used again.
    from limbeck.distill.students import initialise

    initialise_student = initialise.initialise_student

    def fail_if_wild(setting: Any, plan: Any) -> Any:
        if plan.student == "wild":
            raise RuntimeError("out of something\nand more")
        return initialise_student(setting, plan)

    monkeypatch.setattr(initialise, "initialise_student", fail_if_wild)
    done = limbeck("distill", path, "--format", "json")
    assert done.code == 1
    assert "wild: RuntimeError: out of something (traceback in" in done.err
    assert "and more" in Path(done.err.partition("(traceback in ")[2].partition(")")[0]).read_text()
    assert [run.info.run_id for run in sweep_runs(store)] == [parent.info.run_id]
    assert [version.version for version in store.versions("tiny")] == [1, 2]


def test_resume_continues_a_run_and_restart_removes_it(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, limbeck_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(extra="save_minutes = 0.0001\n")
    without_run = limbeck("distill", path, "--resume")
    assert (without_run.code, without_run.out) == (2, "")
    assert "has no earlier run of" in without_run.err
    assert store.versions() == []
    both = limbeck("distill", path, "--resume", "--restart")
    assert both.code == 2

    from limbeck.distill.students import student

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(student, "_save", interrupt)
        assert limbeck("distill", path).code == 130
    [folder] = (limbeck_home / "runs").iterdir()
    assert list(folder.glob("checkpoint-*"))
    marker = folder / "marker"
    marker.touch()
    resumed = limbeck("distill", path, "--resume", "--format", "json")
    assert resumed.code == 0
    assert "resuming from checkpoints: 1 of 1 students" in resumed.err
    assert not folder.exists()  # removed when the student is registered

    # Stopped during the pass of the teacher, before any checkpoint.
    from limbeck.distill.run import distill

    with monkeypatch.context() as patch:
        patch.setattr(distill, "teachers_for", interrupt)
        assert limbeck("distill", path, "--set", "seed=5").code == 130
    later = limbeck("distill", path, "--set", "seed=5", "--resume")
    assert later.code == 0
    assert "checkpoints" not in later.err

    folder.mkdir()
    marker.touch()
    again = limbeck("distill", path, "--restart", "--format", "json")
    assert again.code == 0
    assert [each["trained"] for each in json.loads(again.out)] == [True]
    assert not folder.exists()
    assert [each["trained"] for each in json.loads(limbeck("distill", path, "--resume", "--format", "json").out)] == [
        False
    ]
