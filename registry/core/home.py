"""The folder of Limbeck's state: `.limbeck/` in the current folder, or `LIMBECK_HOME`; and how to write into it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def home() -> Path:
    """The state folder, created if it is missing."""
    folder = Path(os.environ.get("LIMBECK_HOME", ".limbeck")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in `home()`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target` that is renamed to `target` only if the block raises nothing.

    Works for files and folders; `target` is never half written.
    An existing folder is replaced: it is moved aside first, so that `target` is never half deleted either.
    Files that a library made readable for their owner alone, as safetensors does, get the mode that the umask asks for.
    """
    import shutil

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid4().hex[:8]}.part"
    try:
        yield temporary
        _apply_umask(temporary)
        old = temporary.with_suffix(".old")
        if temporary.is_dir() and target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _apply_umask(path: Path) -> None:
    """Let others read the files in `path`, or the file `path`, as far as the umask allows."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in [path, *(path.rglob("*") if path.is_dir() else ())]:
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 == 0o600:
            file.chmod(0o666 & ~umask)


@contextmanager
def machine_lock(name: str) -> Iterator[None]:
    """Let one process of this machine at a time into the block: a file lock in `home()/locks`."""
    from filelock import FileLock

    path = home() / "locks" / (re.sub(r"[^A-Za-z0-9_.-]", "_", name) + ".lock")
    path.parent.mkdir(exist_ok=True)
    with FileLock(path):
        yield
