"""Bad input is reported with file, line and key, before any training; nothing is registered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from limbeck.registry.mlflow.store import Store
from tests.conftest import make_model
from tests.distill.conftest import DISTILLED, STUDENTS

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]


def line_of(recipe: Path, text: str) -> int:
    return next(n for n, line in enumerate(recipe.read_text().splitlines(), 1) if line.startswith(text))


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("max_steps = 4", "max_step = 4", ["unknown key training.max_step", "did you mean max_steps"]),
        ("max_steps = 4", 'max_steps = "four"', ["training.max_steps", "integer", "'four'"]),
        ("max_steps = 4", 'optim = "adam"', ["training.optim", "adamw_torch"]),
        ("max_steps = 4", 'lr_scheduler_type = "cosin"', ["training.lr_scheduler_type", "did you mean 'cosine'"]),
        ("heldout = 0.2", "heldout = 1.5", ["data.heldout", "less than 1"]),
        ("hidden_size = 32", "hiden_size = 32", ["llama has no setting 'hiden_size'", "did you mean hidden_size"]),
        ('model_type = "llama"', 'model_type = "lama"', ["'lama' is not an architecture", "did you mean llama"]),
        ("num_attention_heads = 4", "num_attention_heads = 5", ["students.small.config", "no model can be made"]),
        ("labels = 1.0", 'divergence = "reverse_k"', ["objectives.labels.divergence", "did you mean 'reverse_kl'"]),
        ('path = "text.txt"', 'path = "txt.text"', ["data.path 'txt.text' does not exist"]),
        ("labels = 1.0", "lables = 1.0", ["unknown key objectives.labels.lables", "did you mean labels"]),
        ("max_length = 32", "max_length = 90000", ["do not fill one block of 90000"]),
    ],
)
def test_mistakes_in_a_recipe_are_reported(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, old: str, new: str, messages: list[str]
) -> None:
    recipe = write_recipe()
    recipe.write_text(recipe.read_text().replace(old, new, 1))
    done = limbeck("distill", recipe)
    assert (done.code, done.out) == (2, "")
    for message in messages:
        assert message in done.err
    assert "recipe.toml" in done.err
    if "max_length" not in new and "heads" not in new:  # their errors are about a table, not a line
        assert f"recipe.toml:{line_of(recipe, new)}: " in done.err
    assert store.versions() == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("students.small.training.learning_rate=-1", "students.small.training.learning_rate: "),
        ("students.small.training.max_step=9", "did you mean max_steps"),
        ("data.path=nowhere.txt", "error: --set data.path=nowhere.txt: data.path 'nowhere.txt' does not exist"),
        ("students.small.config.hidden=3", "llama has no setting 'hidden'"),
        ("cache.top_k", "it must be KEY=VALUE"),
    ],
)
def test_mistakes_in_an_override_are_reported(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, override: str, message: str
) -> None:
    done = limbeck("distill", write_recipe(), "--set", override)
    assert done.code == 2
    assert message in done.err
    assert f"--set {override}" in done.err


def test_parts_that_do_not_fit_together_are_reported(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, tmp_path: Path
) -> None:
    done = limbeck("distill", tmp_path / "recipes.toml")
    assert done.code == 2
    assert "recipes.toml: no such file" in done.err
    assert "did you mean" not in done.err or "recipe.toml" in done.err
    done = limbeck("distill", write_recipe(objectives=DISTILLED))
    assert "objectives.distilled has a divergence but the recipe has no [teacher]" in done.err
    done = limbeck("distill", write_recipe(), "--set", "objectives.labels.labels=0.5")
    assert "objectives.labels: an objective without a divergence learns from labels alone" in done.err
    layered = write_recipe(tiny_llama, objectives=DISTILLED + "layers = {}\n", extra="[cache]\nform = 'topk'\n")
    assert 'set cache.form = "online"' in limbeck("distill", layered).err
    deep = write_recipe(tiny_llama, objectives=DISTILLED + "layers = { map = { 1 = 99 } }\n")
    done = limbeck("distill", deep)
    assert done.code == 2
    assert "objectives.distilled.layers: layers.map maps the student's layer 1 to the teacher's 99" in done.err
    two = write_recipe(tiny_llama, objectives=DISTILLED + "[objectives.other]\nlabels = 1.0\n")
    assert "makes 2" in limbeck("distill", two, "--output", tmp_path / "copy").err
    (tmp_path / "mine").mkdir()
    done = limbeck("distill", write_recipe(tiny_llama), "--output", tmp_path / "mine")
    assert (done.code, (tmp_path / "mine").is_dir()) == (2, True)


@pytest.fixture
def broken_teacher(tmp_path: Path, tiny_llama: Path) -> Callable[[str], Path | str]:
    """Make a teacher with a defect."""

    def make(defect: str) -> Path | str:
        folder = tmp_path / "broken"
        if defect == "gone":
            return "./nowhere"
        if defect == "unregistered":
            return "no-such-teacher/1"
        if defect == "no model":
            folder.mkdir()
            return folder
        shutil.copytree(tiny_llama, folder)
        weights = folder / "model.safetensors"
        if defect == "pickle":
            torch.save(load_file(weights), folder / "pytorch_model.bin")
            weights.unlink()
        elif defect == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif defect == "no tokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()
        elif defect == "no such architecture":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
        return folder

    return make


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("gone", "no such folder"),
        ("unregistered", "no model is registered as 'no-such-teacher'"),
        ("no model", "is not a model: it has no config.json"),
        ("pickle", "pickle files only"),
        ("truncated", "is damaged: model.safetensors"),
        ("no tokenizer", "no tokenizer"),
        ("no such architecture", "config.json cannot be read"),
    ],
)
def test_broken_teachers_are_reported(
    store: Store,
    limbeck: Limbeck,
    write_recipe: WriteRecipe,
    broken_teacher: Callable[[str], Path | str],
    defect: str,
    message: str,
) -> None:
    recipe = write_recipe(broken_teacher(defect), objectives=DISTILLED)
    done = limbeck("distill", recipe)
    assert done.code == 2
    assert message in done.err
    assert f"recipe.toml:{line_of(recipe, 'model = ')}: teacher.model" in done.err
    assert store.versions() == []


def test_blocks_longer_than_the_teachers_context_are_reported(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_gpt2: Path
) -> None:
    done = limbeck("distill", write_recipe(tiny_gpt2, objectives=DISTILLED), "--set", "data.max_length=256")
    assert done.code == 2
    assert "has 128 positions and data.max_length is 256" in done.err
    assert "set data.max_length = 128 or less" in done.err


def test_blocks_longer_than_a_students_context_are_reported(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    short = STUDENTS["llama"] + "\nmax_position_embeddings = 16"
    done = limbeck("distill", write_recipe(tiny_llama, short, DISTILLED))
    assert done.code == 2
    assert "recipe.toml:" in done.err
    assert "small has 16 positions" in done.err
    assert "set data.max_length = 16 or less" in done.err
    student = make_model(tmp_path / "short", tokenizer_folder, "gpt2", n_positions=24)
    recipe = write_recipe(tiny_llama, student, DISTILLED)
    done = limbeck("distill", recipe)
    assert done.code == 2
    line = line_of(recipe, f'model = "{student}')
    assert f"recipe.toml:{line}: students.small.model" in done.err
    assert "has 24 positions and data.max_length is 32" in done.err
    assert store.versions() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "it has 0 in all"), (" \n\n \n", "it has 0 in all"), ("two words\n", "leaves no train document")],
)
def test_an_empty_or_tiny_text_is_reported(
    store: Store,
    limbeck: Limbeck,
    write_recipe: WriteRecipe,
    text_file: Path,
    tiny_llama: Path,
    text: str,
    message: str,
) -> None:
    recipe = write_recipe(tiny_llama, objectives=DISTILLED)
    text_file.write_text(text)
    done = limbeck("distill", recipe)
    assert done.code == 2
    assert message in done.err
    assert f"recipe.toml:{line_of(recipe, 'path = ')}: data.path" in done.err
    assert store.versions() == []


def test_a_student_with_another_tokenizer_is_reported(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, tmp_path: Path
) -> None:
    from limbeck.distill.data.blocks import train_tokenizer
    from limbeck.distill.data.document import Document

    train_tokenizer([Document("a", "other words, other tokens " * 9)], 270, 128).save_pretrained(tmp_path / "tokens")
    student = make_model(tmp_path / "student", tmp_path / "tokens", "llama")
    recipe = write_recipe(tiny_llama, student, DISTILLED)
    done = limbeck("distill", recipe)
    assert done.code == 2
    line = line_of(recipe, f'model = "{student}')
    assert f"recipe.toml:{line}: students.small.model" in done.err
    assert "different from the 300 of the recipe's tokenizer" in done.err
    assert not (tmp_path / "home" / "teacher-cache").exists()


def test_a_run_that_diverges_registers_nothing(store: Store, limbeck: Limbeck, write_recipe: WriteRecipe) -> None:
    student = STUDENTS["llama"] + "\nrms_norm_eps = -10.0"
    done = limbeck("distill", write_recipe(student=student))
    assert done.code == 1
    assert "training diverged at step 1" in done.err
    assert store.versions() == []
    [run] = store.client.search_runs([store.runs.experiment_id()])
    assert run.info.status == "FAILED"
