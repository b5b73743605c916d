"""What the other processes of a run do, where `torchrun` or `accelerate launch` started several: train as told.

The first process reads the recipe, has the teacher speak and registers; it tells which student is trained next.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from limbeck.distill.recipe import grid, load
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Budget, Training
from limbeck.distill.run.prepare import prepare_setting, with_generated_text
from limbeck.distill.students import student
from limbeck.distill.teacher.signal import teachers_for
from limbeck.distill.training import distributed
from limbeck.registry.mlflow.store import Store


def run_worker(path: Path, overrides: list[str]) -> None:
    """Take part in the training of every student that the first process makes, until it lets this one go."""
    missing = distributed.receive_from_main()  # when the text is written and all that is stored of the teacher is there
    if missing is None:
        return
    # What there is to say the first process says.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        recipe = load.load_recipe(path, overrides)
        plans = {plan.label: plan for plan in grid.plan_students(recipe)}
        setting = with_generated_text(prepare_setting(recipe, Source(path, tuple(overrides)), Store()))
        teachers = teachers_for(setting, [plans[label] for label in missing])
        while order := distributed.receive_from_main():
            plan = plans[order["label"]]
            schedule = Training.model_validate(order["training"]), Budget.model_validate(order["budget"])
            student.train_one(setting, plan, schedule, teachers.get(plan.label), Path(order["folder"]))
