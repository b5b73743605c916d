"""Whether an artifact fits in memory, checked before it is loaded: the kernel kills a process that takes too much."""

from __future__ import annotations

from pathlib import Path

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.machine import available_memory


def check_memory(artifact: Path, cache_bytes: int | None) -> None:
    """Raise BadInput if the files of an artifact and the key-value cache asked for exceed the memory available.

    Args:
        artifact: its folder. Loaded, it takes at least the size of its files.
        cache_bytes: of all keys and values; None: it takes what is left.
    """
    model = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    free = available_memory()
    if model + (cache_bytes or 0) <= free:
        return
    cache = f" and the cache {_mb(cache_bytes)}" if cache_bytes else ""
    raise BadInput(
        f"the model takes {_mb(model)}{cache}, but {_mb(free)} of memory are available",
        fix="lower --cache-mb" if cache_bytes and model <= free else "free some, or export a smaller precision",
    )


def _mb(size: int) -> str:
    return f"{size / 2**20:,.0f} MB"
