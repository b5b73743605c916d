"""Every recipe that is shipped loads, says how it is run, and runs at tiny scale."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from distill import recipe as recipes
from registry.store import Store
from tests.conftest import make_model

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    [*ROOT.glob("distill/recipes/*.toml"), ROOT / "quickstart/recipe.toml", ROOT / "quickstart/teacher.toml"]
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_begins_with_the_command_that_runs_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert f"limbeck distill {path.relative_to(ROOT)}" in first
    recipe = recipes.load(path)
    plans = recipes.plans(recipe)
    assert plans
    if recipe.teacher is not None:  # each student has its control
        assert {plan.control is None for plan in plans} == {True, False}


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def test_distilgpt2(
    store: Store, limbeck: Callable[..., Any], text_file: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Every second layer of the teacher, its last hidden state followed."""
    make_model(tmp_path / "gpt2", tokenizer_folder, "gpt2", n_layer=12)
    rows = [{"text": piece} for piece in text_file.read_text().split("\n\n") if piece]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = ["data.max_length=32", "data.heldout=0.2", "training.max_steps=2", "training.per_device_train_batch_size=2"]
    tiny += ["data.path=rows.jsonl", f"teacher.model={tmp_path / 'gpt2'}", "training.gradient_accumulation_steps=2"]
    done = limbeck("distill", ROOT / "distill/recipes/distilgpt2.toml", *sets(*tiny), "--format", "json")
    assert done.code == 0, done.err
    assert [student["recipe"] for student in json.loads(done.out)] == ["distil-distilled", "distil-labels"]
    for number in (2, 3):
        student = AutoModelForCausalLM.from_pretrained(store.folder(store.get(f"distilgpt2/{number}")))
        assert student.config.n_layer == 6
    recipe = recipes.load(ROOT / "distill/recipes/distilgpt2.toml")
    assert recipe.objectives["distilled"].layers is not None
    assert recipe.objectives["distilled"].layers.map == {6: 12}


def test_shakespeare(store: Store, limbeck: Callable[..., Any], text_file: Path) -> None:
    """As in the README: a teacher is made, then its students, from one text file."""
    tiny = ["data.path=" + str(text_file), "data.max_length=32", "training.max_steps=2"]
    tiny += ["training.per_device_train_batch_size=2"]
    folder = ROOT / "distill" / "recipes"
    one = ["--set", "tokenizer.vocab_size=280", "--format", "json"]
    done = limbeck("distill", folder / "shakespeare-teacher.toml", *sets(*tiny), *one)
    assert done.code == 0, done.err
    done = limbeck("distill", folder / "shakespeare.toml", *sets(*tiny), "--format", "json")
    assert done.code == 0, done.err
    assert [student["recipe"] for student in json.loads(done.out)] == ["small-distilled", "small-labels"]
    assert store.get("shakespeare/1").parent == "shakespeare-teacher/1"
