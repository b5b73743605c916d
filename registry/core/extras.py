"""The packages that each extra of Limbeck installs, read from the metadata of the installed distribution."""

from __future__ import annotations

import re
from pathlib import Path

# Module -> pip's name of its package, if they differ.
DISTRIBUTIONS = {
    "markdown_it": "markdown-it-py",
    "psycopg2": "psycopg2-binary",
    "pydantic_core": "pydantic",
    "yaml": "pyyaml",
}
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<extras>[^]]*)\])?.*?(extra == [\"'](?P<extra>[\w.-]+)[\"'])?$")
BUNDLE_REQUIREMENTS = Path(__file__).parents[4] / "requirements.txt"  # of a bundle that `limbeck deploy` wrote


def packages_of_extras() -> dict[str, set[str]]:
    """Extra -> its packages, including those of the extras in it; "" -> the packages that are always required.

    Raises importlib.metadata.PackageNotFoundError if Limbeck is not installed, as in a bundle.
    """
    from importlib.metadata import requires

    packages: dict[str, set[str]] = {"": set()}
    inner_extras: dict[str, set[str]] = {}
    for line in requires("limbeck") or []:
        found = REQUIREMENT.match(line)
        if found is None:
            continue
        extra = found["extra"] or ""
        own = packages.setdefault(extra, set())
        if found["name"] == "limbeck":
            inner_extras.setdefault(extra, set()).update(re.findall(r"[\w.-]+", found["extras"]))
        else:
            own.add(canonical_name(found["name"]))
    return {extra: set().union(*(packages[e] for e in _reachable(extra, inner_extras))) for extra in packages}


def install_command(module: str, preferred: str = "") -> str | None:
    """The command that installs the package of a missing module; None if no extra provides it.

    Args:
        module: `ModuleNotFoundError.name`.
        preferred: the extra to install if it provides the package; else the smallest one that does.
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
    """pip's name of the package of a missing module; None for a submodule, since its package is installed."""
    known = [name for name in DISTRIBUTIONS if f"{module}.".startswith(f"{name}.")]
    if known:
        return DISTRIBUTIONS[known[0]]
    return None if "." in module else canonical_name(module)


def canonical_name(name: str) -> str:
    """The normalized name of a package: `lm_eval` is `lm-eval`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _reachable(extra: str, inner_extras: dict[str, set[str]]) -> set[str]:
    """An extra and all extras in it."""
    found, queue = set[str](), [extra]
    while queue:
        each = queue.pop()
        if each not in found:
            found.add(each)
            queue += inner_extras.get(each, ())
    return found
