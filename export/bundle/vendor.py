"""Find the modules of Limbeck that a serving host runs, and the packages they need, by following imports."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
# module -> the function whose own imports count too, or "". A host runs `limbeck serve`, so the imports inside `serve`
# count; imports inside other functions (of the registry, for example) do not.
ENTRY_POINTS = {"limbeck.__main__": "", "limbeck.cli": "", "limbeck.export.commands.serve": "serve"}


def source_files() -> dict[str, Path]:
    """Map the path below the root, such as "limbeck/export/server/app.py", -> the file, of each module that serves."""
    paths = [_module_file(module) for module in _follow_imports()[0]]
    return {path.relative_to(ROOT).as_posix(): path for path in paths}


def pinned_requirements(*extra_modules: str) -> list[str]:
    """List the packages that those modules and `extra_modules` need, as sorted "name==version" of what is installed."""
    distributions = _distributions_of_modules()
    pins: dict[str, str] = {}
    for module in [*_follow_imports()[1], *extra_modules]:
        for name in distributions.get(module, [module]):
            _pin(name, set(), pins)
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


@cache
def _distributions_of_modules() -> Mapping[str, list[str]]:
    """Map top-level module -> distributions that contain it. Cached: reading all metadata takes about a second."""
    return importlib.metadata.packages_distributions()


def _pin(name: str, extras: set[str], pins: dict[str, str]) -> None:
    """Add the distribution `name` with `extras`, and its requirements, to `pins`."""
    found = importlib.metadata.distribution(name)
    key = canonicalize_name(found.metadata["Name"])
    if key in pins and not extras:
        return
    pins[key] = found.version
    for line in found.requires or []:
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            _pin(needed.name, needed.extras, pins)


@cache
def _follow_imports() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return Limbeck's modules, and the top-level module names of third parties."""
    ours: dict[str, None] = {}
    others: dict[str, None] = {}
    queue: list[str] = []

    def add(name: str) -> None:
        # `import a.b` runs a/__init__.py too.
        parts = name.split(".")
        for part in (".".join(parts[: end + 1]) for end in range(len(parts))):
            if part not in ours and _module_file(part).is_file():
                ours[part] = None
                queue.append(part)

    for entry in ENTRY_POINTS:
        add(entry)
    for module in queue:
        imports = _Imports(ENTRY_POINTS.get(module, ""))
        imports.visit(ast.parse(_module_file(module).read_text()))
        for name in imports.names:
            top = name.partition(".")[0]
            if top == "limbeck":
                add(name)
            elif top not in sys.stdlib_module_names:
                others[top] = None
    return tuple(ours), tuple(others)


def _module_file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


class _Imports(ast.NodeVisitor):
    """Collects the names that a module imports at import time, and those that its function `function` imports."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.names: list[str] = []

    def visit_Import(self, node: ast.Import) -> None:
        self.names += [alias.name for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.names += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name == self.function:
            self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        pass

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)
