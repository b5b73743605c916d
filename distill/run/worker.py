"""The worker processes of a run that `torchrun` or `accelerate launch` started: train what the main process sends.

The main process runs the teacher and registers students (`limbeck.distill.training.distributed`).
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
    """Take part in the training of every student that the main process makes, until it sends None."""
    missing = distributed.receive_from_main()  # sent when the text is written and the teacher caches are filled
    if missing is None:
        return
    # Only the main process prints.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        recipe = load.load_recipe(path, overrides)
        plans = {plan.label: plan for plan in grid.plan_students(recipe)}
        setting = with_generated_text(prepare_setting(recipe, Source(path, tuple(overrides)), Store()))
        teachers = teachers_for(setting, [plans[label] for label in missing])
        while order := distributed.receive_from_main():
            plan = plans[order["label"]]
            schedule = Training.model_validate(order["training"]), Budget.model_validate(order["budget"])
            student.train_student(setting, plan, schedule, teachers.get(plan.label), Path(order["folder"]))
