"""A machine where only some of what is installed here can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from limbeck.registry.core.extras import packages_of_extras
from tests import ROOT

# Its sitecustomize.py: the distributions of ALLOWED are installed, and Limbeck.
HOST = """
import importlib.machinery, importlib.metadata, os, sys
allowed = set(os.environ["ALLOWED"].split()) | {"limbeck"}
installed = importlib.metadata.packages_distributions()
class HostFinder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        owners = {d.lower().replace("_", "-").replace(".", "-") for d in installed.get(name, ())}
        return None if owners and not owners & allowed else super().find_spec(name, path, target)
sys.meta_path = [HostFinder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def distributions_of_host(*extras: str) -> set[str]:
    """All that pip installs for `limbeck[extras]`, with what the packages need in turn."""
    packages = packages_of_extras()
    found: set[str] = set()
    queue = [(name, "") for extra in ("", *extras) for name in packages[extra]]
    seen = set()
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found.add(name)
        for line in _requirements(name):
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                queue += [(canonicalize_name(needed.name), each) for each in ("", *needed.extras)]
    return found


def _requirements(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # for another Python or platform
        return []


def run_on_host(folder: Path, allowed: set[str], *args: object) -> subprocess.CompletedProcess[str]:
    """Run Python with `args` in a process that can import Limbeck and the distributions `allowed` alone."""
    (folder / "sitecustomize.py").write_text(HOST)
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = kept | {"PYTHONPATH": paths, "ALLOWED": " ".join(allowed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", *map(str, args)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def run_limbeck_on_host(folder: Path, allowed: set[str], *args: object) -> subprocess.CompletedProcess[str]:
    """Run a `limbeck` command line on such a machine."""
    return run_on_host(folder, allowed, "-m", "limbeck", *args)
