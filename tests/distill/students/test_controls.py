"""Controls: students of labels alone at equal tokens and at equal cost, and the untrained student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from limbeck.distill.recipe import grid, load
from limbeck.distill.recipe import schema as recipes
from limbeck.distill.recipe.load import Source
from limbeck.distill.run.prepare import prepare_setting
from limbeck.distill.students import initialise, matching
from limbeck.distill.students.controls import Cost, total_cost, training_and_budget
from limbeck.distill.students.keys import student_key
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import TrainingCost, Version
from tests.distill.conftest import DISTILLED

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]
ALL_CONTROLS = 'controls = ["labels", "labels_equal_cost", "untrained"]\n'


def training_cost(seconds: float, tokens: int, **more: Any) -> TrainingCost:
    return TrainingCost(training_seconds=seconds, tokens=tokens, machine="a test", **more)


def test_a_sweep_makes_its_controls(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path
) -> None:
    path = write_recipe(tiny_llama, objectives=DISTILLED, extra=f"[sweep]\n{ALL_CONTROLS}")
    done = limbeck("distill", path, "--format", "json")
    assert done.code == 0, done.err
    made = {each["recipe"]: Version.model_validate({k: v for k, v in each.items() if k != "trained"})
            for each in json.loads(done.out)}  # fmt: skip
    assert {label: version.control for label, version in made.items()} == {
        "small-distilled": None,
        "small-labels": "labels",
        "small-untrained": "untrained",
        "small-labels-equal-cost": "labels_equal_cost",
    }
    assert len({version.family for version in made.values()}) == 1
    assert len({version.recipe_digest for version in made.values()}) == 4
    # Only the distilled student was made from the teacher; all are compared with it.
    assert [(v.parent, v.teacher) for v in made.values()] == [("tiny/1", "tiny/1")] + [(None, "tiny/1")] * 3
    for version in made.values():
        assert store.client.get_run(version.run_id).data.tags.get("limbeck.control") == version.control

    costs = {label: store.runs.training_cost(version) for label, version in made.items()}
    distilled, labels, longer = (
        costs[label] for label in ("small-distilled", "small-labels", "small-labels-equal-cost")
    )
    assert distilled
    assert labels
    assert longer
    assert distilled.teacher_seconds > 0
    assert labels.tokens == distilled.tokens  # equal tokens
    spent = distilled.training_seconds + distilled.teacher_seconds
    tokens_per_step = 4 * 32
    assert longer.tokens == tokens_per_step * max(
        1, round(labels.tokens / tokens_per_step * spent / labels.training_seconds)
    )
    assert f"in the {spent:,.0f} s that small-distilled cost" in done.err
    assert costs["small-untrained"]
    assert (costs["small-untrained"].tokens, costs["small-untrained"].training_seconds) == (0, 0)
    assert "no training" in (store.artifacts.verified_folder(made["small-untrained"]) / "README.md").read_text()
    assert (
        "at equal cost" in (store.artifacts.verified_folder(made["small-labels-equal-cost"]) / "README.md").read_text()
    )

    # The untrained student has the initial weights of the others.
    setting = prepare_setting(load.load_recipe(path), Source(path), store)
    start = initialise.initialise_student(setting, grid.plan_students(setting.recipe)[0]).state_dict()
    saved = load_file(store.artifacts.verified_folder(made["small-untrained"]) / "model.safetensors")
    assert all(np.array_equal(saved[name], start[name].numpy()) for name in saved)
    again = json.loads(limbeck("distill", path, "--format", "json").out)
    assert [each["trained"] for each in again] == [False] * 4


def test_equal_cost_counts_the_teacher_and_the_endpoint(
    store: Store, write_recipe: WriteRecipe, tiny_llama: Path
) -> None:
    path = write_recipe(tiny_llama, objectives=DISTILLED + '[objectives.jsd]\ndivergence = "jsd"\n',
                        extra=f"[sweep]\n{ALL_CONTROLS}[budget]\nusd_per_hour = 0.5\n")  # fmt: skip
    recipe = load.load_recipe(path)
    paid = training_cost(60, 1000, teacher_seconds=20, api_usd=2.0 + 3.0)
    assert total_cost(paid, recipe) == Cost(
        60, pytest.approx(20 + (2 + 3) / 0.5 * 3600)
    )  # dollars count as seconds of this machine

    setting = prepare_setting(recipe, Source(path), store)
    plans = {plan.label: plan for plan in grid.plan_students(recipe)}
    plan = plans["small-labels-equal-cost"]
    others = [
        (plans["small-distilled"], training_cost(50, 2048, teacher_seconds=30)),
        (plans["small-jsd"], training_cost(90, 2048, teacher_seconds=30)),  # the more expensive one
        (plans["small-labels"], training_cost(40, 2048)),
    ]
    assert matching.plans_to_match(recipe, plan) == [
        plans["small-distilled"],
        plans["small-jsd"],
        plans["small-labels"],
    ]
    training, budget = training_and_budget(setting, plan, others)
    assert training.max_steps == 16 * 120 / 40  # 16 steps took 40 s
    assert budget == recipes.Budget()


def test_labels_read_as_many_tokens_as_the_distilled_student_within_its_budget(
    store: Store, write_recipe: WriteRecipe, tiny_llama: Path
) -> None:
    path = write_recipe(tiny_llama, objectives=DISTILLED, extra=f"[sweep]\n{ALL_CONTROLS}[budget]\nmax_minutes = 5\n")
    recipe = load.load_recipe(path)
    setting = prepare_setting(recipe, Source(path), store)
    plans = {plan.label: plan for plan in grid.plan_students(recipe)}
    labels = plans["small-labels"]
    assert [plan.label for plan in matching.plans_to_match(recipe, labels)] == ["small-distilled"]
    training, budget = training_and_budget(setting, labels, [(plans["small-distilled"], training_cost(300, 640))])
    assert (training, budget) == (recipe.training, recipes.Budget(max_tokens=640))


def test_a_controls_key_has_everything_it_depends_on(store: Store, write_recipe: WriteRecipe, tiny_llama: Path) -> None:
    def keys(*sets: str) -> dict[str, str]:
        path = write_recipe(tiny_llama, objectives=DISTILLED, extra=f"[sweep]\n{ALL_CONTROLS}")
        recipe = load.load_recipe(path, list(sets))
        setting = prepare_setting(recipe, Source(path, sets), store)
        return {plan.label: student_key(setting, plan) for plan in grid.plan_students(recipe)}

    def changed(*sets: str) -> set[str]:
        return {label for label, key in keys(*sets).items() if base[label] != key}

    base = keys()
    # The distilled student decides the cost, and so how long its control trains.
    assert changed("objectives.distilled.divergence=jsd") == {"small-distilled", "small-labels-equal-cost"}
    assert changed("seed=1") == set(base)
    # A price alone changes no student, except the control at equal cost.
    assert changed("budget.usd_per_hour=3.0") == {"small-labels-equal-cost"}
    assert changed("budget.usd_per_hour=3.0", "budget.max_usd=1.0") == set(base)
    assert changed("training.learning_rate=0.1") == set(base)


def test_a_control_of_a_student_that_failed_is_not_made(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialise_student = initialise.initialise_student

    def fail_if_distilled(setting: Any, plan: Any) -> Any:
        if plan.control is None:
            raise RuntimeError("no")
        return initialise_student(setting, plan)

    monkeypatch.setattr(initialise, "initialise_student", fail_if_distilled)
    path = write_recipe(tiny_llama, objectives=DISTILLED, extra=f"[sweep]\n{ALL_CONTROLS}")
    done = limbeck("distill", path, "--format", "json")
    assert done.code == 1
    assert [each["recipe"] for each in json.loads(done.out)] == ["small-labels", "small-untrained"]
    assert "small-labels-equal-cost: its length depends on small-distilled, which was not made" in done.err
