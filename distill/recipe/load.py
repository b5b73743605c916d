"""Reads and checks a recipe file, and finds where a key was set."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from limbeck.distill.recipe import checks
from limbeck.distill.recipe.schema import Recipe
from limbeck.registry.core import toml


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe; each of `overrides` is `KEY=VALUE`. Raises BadInput with file, line and key."""
    text = toml.read_toml_text(path)
    recipe = toml.parse_toml(text, Recipe, overrides or [], source_name=str(path))
    if problems := list(checks.find_problems(recipe)):
        raise toml.problems_error(problems, text, source_name=str(path))
    return recipe


class Source(NamedTuple):
    """Where a recipe was read from: its file and the `--set` overrides."""

    path: Path
    overrides: tuple[str, ...] = ()

    def locate_key(self, *key: str) -> str:
        """Where `key` was set: `recipe.toml:12: students.small.config.hidden_size`, or the `--set` option."""
        name = ".".join(key)
        override = next((o for o in self.overrides if o.partition("=")[0].strip() == name), None)
        if override:
            return f"--set {override}"
        line = toml.key_lines(self.path.read_text(encoding="utf-8")).get(key)
        return f"{self.path}:{line}: {name}" if line else f"{self.path}: {name}"
