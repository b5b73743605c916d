"""The overlay: a folder with the packages of the export engine optimum, for a subprocess to import before others.

optimum-onnx needs an older transformers than Limbeck. The overlay holds the few packages that differ, at the versions
of optimum-requirements.txt; torch, onnx, numpy and the rest are those of the environment. Its name has a digest of
these versions, so another version of Limbeck uses another overlay.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import atomic_write

REQUIREMENTS = Path(__file__).with_name("optimum-requirements.txt")
INSTALL_COMMAND = "limbeck doctor --install-optimum"


def overlay_versions() -> dict[str, str]:
    """Package -> version in the overlay."""
    lines = REQUIREMENTS.read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def find_overlay() -> Path | None:
    """Return the folder of the overlay; None if it is not installed."""
    return next((folder for folder in _candidates() if folder.is_dir()), None)


def install_overlay(report: Callable[[str], None]) -> Path:
    """Install the overlay with pip, unless it is installed. Returns its folder.

    It lies in the environment, `sys.prefix`, or in the user's cache if the environment cannot be written.

    Args:
        report: called with a line that says what is installed, and where.

    Raises BadInput if pip fails, as without a network, or if no folder can be written.
    """
    from filelock import FileLock

    target = next((folder for folder in _candidates() if _can_write_in(folder.parent)), None)
    if target is None:
        parents = " nor ".join(str(folder.parent) for folder in _candidates())
        raise BadInput(f"neither {parents} can be written", fix="set XDG_CACHE_HOME to a folder that can")
    with FileLock(target.with_suffix(".lock")):
        if installed := find_overlay():
            return installed
        packages = ", ".join(f"{name} {version}" for name, version in overlay_versions().items())
        report(f"installing the export engine optimum ({packages}) in {target}")
        with atomic_write(target) as folder:
            _pip_install(folder, target)
    return target


def overlay_environment(overlay: Path) -> dict[str, str]:
    """Return the environment variables of a Python process that imports the overlay first, then what this one imports.

    PYTHONPATH has this process's own paths, without the current folder. Nothing is fetched from a hub.
    """
    paths = [str(overlay), *(path for path in sys.path if os.path.isabs(path))]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _candidates() -> list[Path]:
    """The folders where the overlay may lie, the preferred one first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # tokenizers is compiled for a platform, and a cache may be shared.
    digest = json_digest([overlay_versions(), sysconfig.get_platform(), sys.implementation.cache_tag])
    return [parent / "limbeck" / f"optimum-{digest[:12]}" for parent in (Path(sys.prefix) / "share", cache)]


def _can_write_in(folder: Path) -> bool:
    """Create `folder` if it is missing. Returns False if that or writing in it is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _pip_install(folder: Path, target: Path) -> None:
    """Install the packages of the overlay into `folder`, which will be `target`. Raises BadInput."""
    options = ["--no-deps", "--no-user", "--only-binary", ":all:", "--retries", "1"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *options,
        *quiet,
        "--target",
        folder,
        "-r",
        REQUIREMENTS,
    ]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        reason = last_line(done.stderr).removeprefix("ERROR: ") or f"pip ended with {done.returncode}"
        raise BadInput(
            f"the packages of the export engine optimum cannot be installed: {reason}",
            fix=f"where PyPI can be reached: {INSTALL_COMMAND}\n"
            f"  or with another pip: pip install --no-deps --target {target} -r {REQUIREMENTS}",
        )


def last_line(text: str) -> str:
    """Return the last line of `text` that is not empty; "" if there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
