"""What is known of a teacher's licence: what its card states, and what the recipe says instead."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distill import recipe as recipes
from distill.card import licence_of
from distill.recipe import Source
from distill.setting import prepare
from registry.store import Store
from tests.distill.conftest import DISTILLED


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("license: mit", "mit"),
        ("license: other\nlicense_name: qwen\nlicense_link: LICENSE", "qwen"),
        ("license: other", "other"),
        ("tags: [a]", None),
        (None, None),
    ],
)
def test_the_licence_that_a_card_states(tmp_path: Path, card: str | None, licence: str | None) -> None:
    if card:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n\n# a model\n")
    assert licence_of(tmp_path) == licence


def test_whether_a_student_may_learn_from_the_teacher(
    store: Store, write_recipe: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_llama, tmp_path / "teacher")
    path = write_recipe("teacher", objectives=DISTILLED)

    def allowed(*overrides: str) -> bool | None:
        return prepare(recipes.load(path, list(overrides)), Source(path, overrides), store).licence_allows

    assert allowed() is None
    (teacher / "README.md").write_text("---\nlicense: llama2\n---\n")
    assert allowed() is False
    assert allowed("teacher.licence=apache-2.0") is True
    assert allowed("teacher.licence_allows_distillation=true") is True
