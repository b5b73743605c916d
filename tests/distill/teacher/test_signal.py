"""The teacher runs once, and students read its stored outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from limbeck.distill.cache.teacher_cache import TeacherCache
from limbeck.distill.context import Setting
from limbeck.distill.recipe import grid, load
from limbeck.distill.recipe.load import Source
from limbeck.distill.run.prepare import prepare_setting
from limbeck.distill.teacher.signal import caches_for, form_of, teachers_for
from limbeck.registry.mlflow.store import Store
from tests.conftest import Result

STUDENT = 'model_type = "gpt2"\nn_embd = 16\nn_layer = 1\nn_head = 2'
OBJECTIVES = """
[objectives.soft]
divergence = "forward_kl"
labels = 0.25

[objectives.mixed]
divergence = "jsd"
"""
WriteRecipe = Callable[..., Path]


@contextmanager
def forward_passes(teacher: Path) -> Iterator[list[int]]:
    """Record the forward passes in this process of any model with the teacher's weights."""
    passes: list[int] = []
    weight = LlamaForCausalLM.from_pretrained(teacher).lm_head.weight

    def on_forward(module: torch.nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, LlamaForCausalLM) and torch.equal(module.lm_head.weight, weight):
            passes.append(1)

    hook = torch.nn.modules.module.register_module_forward_hook(on_forward)
    try:
        yield passes
    finally:
        hook.remove()


def shorten_text(recipe: Path) -> None:
    """Limit the text, so that a pass over it takes a moment."""
    recipe.write_text(recipe.read_text().replace("[data]", "[data]\nmax_tokens = 2048", 1))


def make_setting(path: Path, store: Store, *sets: str) -> Setting:
    return prepare_setting(load.load_recipe(path, [*sets]), Source(path, sets), store)


def test_students_of_a_filled_cache_do_not_run_the_teacher(
    store: Store, limbeck: Callable[..., Result], write_recipe: WriteRecipe, tiny_llama: Path
) -> None:
    recipe = write_recipe(tiny_llama, STUDENT, OBJECTIVES)
    shorten_text(recipe)
    with forward_passes(tiny_llama) as recorded:
        first = limbeck("distill", recipe, "--set", "training.max_steps=1")
        assert first.code == 0, first.err
        assert recorded
        recorded.clear()
        sets = ("training.max_steps=2", "seed=1", "objectives.soft.labels=0.5", "objectives.mixed.beta=0.3")
        again = limbeck("distill", recipe, *(word for s in sets for word in ("--set", s)))
        assert again.code == 0, again.err
        assert not recorded
    assert len(store.versions()) == 1 + 2 + 2
    for form in ("sampled", "topk"):
        assert f"teacher cache: {form}" in first.err
    assert (first.err.count(" 0 of them captured now"), again.err.count(" 0 of them captured now")) == (0, 2)


def test_missing_temperatures_are_captured_in_one_pass(
    store: Store, write_recipe: WriteRecipe, tiny_llama: Path
) -> None:
    recipe = write_recipe(tiny_llama, STUDENT, OBJECTIVES)
    shorten_text(recipe)

    def passes(temperatures: str) -> tuple[int, set[object]]:
        setting = make_setting(recipe, store, f"sweep.temperatures={temperatures}")
        with forward_passes(tiny_llama) as recorded:
            teachers = teachers_for(setting, grid.plan_students(setting.recipe))
        assert all(isinstance(each, TeacherCache) for each in teachers.values())
        return len(recorded), {each.form.temperature for each in teachers.values()}  # type: ignore[union-attr]

    once, _ = passes("[1.0]")  # and the held-out sample
    assert passes("[1.0]") == (0, {1.0})
    more, temperatures = passes("[1.0, 2.0, 4.0]")
    assert 0 < more < once
    assert temperatures == {1.0, 2.0, 4.0}
    assert passes("[2.0, 1.0]") == (0, {1.0, 2.0})


def test_settings_that_identify_a_cache(
    store: Store, write_recipe: WriteRecipe, tiny_llama: Path, tiny_qwen2: Path
) -> None:
    """Another teacher, text, layout or cache setting needs another cache; settings of the students do not."""
    recipe = write_recipe(tiny_llama, STUDENT, OBJECTIVES.partition("[objectives.mixed]")[0])

    def folder(*sets: str) -> Path:
        setting = make_setting(recipe, store, *sets)
        [cache] = caches_for(setting, [form_of(setting, plan) for plan in grid.plan_students(setting.recipe)]).values()
        return cache.folder

    first = folder()
    for unrelated in (
        "training.learning_rate=0.1",
        "students.small.config.n_layer=2",
        "seed=3",
        "objectives.soft.labels=0",
    ):
        assert folder(unrelated) == first
    changes = [
        f"teacher.model={tiny_qwen2}",
        "data.max_length=16",
        "data.max_tokens=512",
        "data.heldout=0.5",
        "cache.samples=4",
        "cache.form=topk",
        "objectives.soft.temperature=2.0",
        "training.bf16=true",
    ]
    assert len({first, *map(folder, changes)}) == 1 + len(changes)


def test_objectives_that_no_stored_form_serves_run_the_teacher_online(
    store: Store, write_recipe: WriteRecipe, tiny_llama: Path
) -> None:
    layers = '[objectives.layers]\ndivergence = "forward_kl"\nlayers = {}\n'
    recipe = write_recipe(tiny_llama, STUDENT, OBJECTIVES + layers)
    setting = make_setting(recipe, store)
    teachers = teachers_for(setting, grid.plan_students(setting.recipe))
    assert {label: type(each).__name__ for label, each in teachers.items()} == {
        "small-soft": "TeacherCache",
        "small-mixed": "TeacherCache",
        "small-layers": "LlamaForCausalLM",
    }
