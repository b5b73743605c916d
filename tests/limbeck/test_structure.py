"""The structure that contributors rely on, beyond what import-linter and ruff check."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

ROOMS = ("distill", "evals", "export", "quickstart", "registry", "web")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})
MAX_MODULES = 13  # of a folder, beside __init__.py
MAX_LINES = 400
# Where a local import keeps `--help` fast, a measurement free of other work, or the pages free of lm-eval.
MAY_IMPORT_LATE = ("commands", "cli.py", "evals/cost/worker.py", "evals/scores/harness.py")


def name_of_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def late_imports(path: Path) -> Iterator[str]:
    """The imports of Limbeck inside functions, as FILE:LINE."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("limbeck"):
                    yield f"{name_of_path(path)}:{node.lineno}"


def test_limbeck_is_imported_at_the_top_of_a_module() -> None:
    paths = [path for path in MODULES if not any(part in name_of_path(path) for part in MAY_IMPORT_LATE)]
    assert [place for path in paths for place in late_imports(path)] == []


def test_no_module_is_long() -> None:
    long = {name_of_path(path): lines for path in MODULES if (lines := len(path.read_text().splitlines())) > MAX_LINES}
    assert long == {}


def test_no_folder_is_crowded() -> None:
    counts = {name_of_path(folder): len(list(folder.glob("*.py"))) - 1 for folder in FOLDERS}
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of_path)
def test_every_module_says_what_it_is(path: Path) -> None:
    summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    assert summary, "no docstring"
    assert summary.endswith((".", ":", "?")), summary


def test_tests_stand_in_the_folders_of_what_they_test() -> None:
    """tests/ROOM/FOLDER/test_MODULE.py: every folder of tests below a room is a folder of that room."""
    folders = {
        path.parent.relative_to(ROOT / "tests") for room in ROOMS for path in (ROOT / "tests" / room).rglob("test_*.py")
    }
    assert [folder.as_posix() for folder in folders if not (ROOT / folder).is_dir()] == []


def test_rooms_are_links_of_one_package() -> None:
    assert {path.name for path in (ROOT / "limbeck").iterdir() if path.is_symlink() and path.is_dir()} == set(ROOMS)
