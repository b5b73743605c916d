"""Which extra of the distribution brings which package, from what the installer wrote down about Limbeck."""

from __future__ import annotations

import re
from pathlib import Path

# What pip calls a package whose module has another name.
DISTRIBUTIONS = {
    "markdown_it": "markdown-it-py",
    "optimum.exporters": "optimum-onnx",
    "optimum.onnxruntime": "optimum-onnx",
    "psycopg2": "psycopg2-binary",
    "pydantic_core": "pydantic",
    "yaml": "pyyaml",
}
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<extras>[^]]*)\])?.*?(extra == [\"'](?P<extra>[\w.-]+)[\"'])?$")
BUNDLE_REQUIREMENTS = Path(__file__).parents[4] / "requirements.txt"  # of what `limbeck deploy` writes


def packages_of_extras() -> dict[str, set[str]]:
    """Extra -> the packages that it asks for, those of the extras within it too; under "" what is always needed.

    Raises importlib.metadata.PackageNotFoundError if Limbeck is not installed, as in a bundle.
    """
    from importlib.metadata import requires

    packages: dict[str, set[str]] = {"": set()}
    within: dict[str, set[str]] = {}
    for line in requires("limbeck") or []:
        found = REQUIREMENT.match(line)
        if found is None:
            continue
        extra = found["extra"] or ""
        asked = packages.setdefault(extra, set())
        if found["name"] == "limbeck":
            within.setdefault(extra, set()).update(re.findall(r"[\w.-]+", found["extras"]))
        else:
            asked.add(canonical_name(found["name"]))
    return {extra: set().union(*(packages[e] for e in _reachable(extra, within))) for extra in packages}


def install_command(module: str, preferred: str = "") -> str | None:
    """The command that installs the package of a module that cannot be imported; None if no extra brings it.

    Args:
        module: as `ModuleNotFoundError.name` has it.
        preferred: the extra to name if it brings the package; else the smallest that does.
    """
    from importlib.metadata import PackageNotFoundError

    package = distribution_of_module(module)
    if package is None:
        return None
    try:
        packages = packages_of_extras()
    except PackageNotFoundError:
        return f"pip install -r {BUNDLE_REQUIREMENTS}" if BUNDLE_REQUIREMENTS.is_file() else None
    if package in packages[""]:
        return "pip install limbeck"
    extras = sorted((e for e in packages if package in packages[e]), key=lambda e: (e != preferred, len(packages[e])))
    return f"pip install 'limbeck[{extras[0]}]'" if extras else None


def distribution_of_module(module: str) -> str | None:
    """What pip calls the package of a missing module; None for a part of a package, since the rest of it is there."""
    known = [name for name in DISTRIBUTIONS if f"{module}.".startswith(f"{name}.")]
    if known:
        return DISTRIBUTIONS[known[0]]
    return None if "." in module else canonical_name(module)


def canonical_name(name: str) -> str:
    """A package's name in the one spelling that the index knows: `lm_eval` is `lm-eval`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _reachable(extra: str, within: dict[str, set[str]]) -> set[str]:
    """An extra and all extras within it."""
    found, queue = set[str](), [extra]
    while queue:
        each = queue.pop()
        if each not in found:
            found.add(each)
            queue += within.get(each, ())
    return found
