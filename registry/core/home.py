"""Where Limbeck keeps its state: `.limbeck/` under the current folder, or `LIMBECK_HOME`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def home() -> Path:
    """The state folder, made if it is missing."""
    folder = Path(os.environ.get("LIMBECK_HOME", ".limbeck")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in `home()`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its name only if the block ends well.

    Works for files and for folders; nothing half-written is ever seen under `target`.
    An existing folder is replaced: it is moved aside first, so that it is never seen half deleted.
    """
    import shutil

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid4().hex[:8]}.part"
    try:
        yield temporary
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
