"""Every recipe that is shipped loads, says how it is run, and runs at tiny scale."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill import recipe as recipes
from registry.store import Store

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    [*ROOT.glob("distill/recipes/*.toml"), ROOT / "quickstart/recipe.toml", ROOT / "quickstart/teacher.toml"]
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_begins_with_the_command_that_runs_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert f"limbeck distill {path.relative_to(ROOT)}" in first
    recipe = recipes.load(path)
    assert recipes.plans(recipe)
    if recipe.teacher is not None:  # each student has its control
        assert {objective.divergence is None for objective in recipe.objectives.values()} == {True, False}


def test_shakespeare(store: Store, limbeck: Callable[..., Any], text_file: Path) -> None:
    """As in the README: a teacher is made, then its students, from one text file."""
    tiny = ["data.path=" + str(text_file), "data.max_length=32", "training.max_steps=2"]
    tiny += ["training.per_device_train_batch_size=2"]
    sets = [word for override in tiny for word in ("--set", override)]
    folder = ROOT / "distill" / "recipes"
    one = ["--set", "tokenizer.vocab_size=280", "--format", "json"]
    done = limbeck("distill", folder / "shakespeare-teacher.toml", *sets, *one)
    assert done.code == 0, done.err
    done = limbeck("distill", folder / "shakespeare.toml", *sets, "--format", "json")
    assert done.code == 0, done.err
    assert [student["recipe"] for student in json.loads(done.out)] == ["small-distilled", "small-labels"]
    assert store.get("shakespeare/1").parent == "shakespeare-teacher/1"
