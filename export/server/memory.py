"""Memory of a server: whether an artifact fits, since the kernel kills a process that takes too much; its cache."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.session import NUMPY_TYPES, grows
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


def cache_bytes_per_token(runtime: Runtime) -> int:
    """Bytes of the key-value cache for one token of one row. A recurrent state does not grow with its tokens."""
    total = 0
    for item in runtime.past_inputs.values():
        if grows(item):
            fixed = [size for size in item.shape if isinstance(size, int)]
            total += math.prod(fixed) * np.dtype(NUMPY_TYPES[item.type]).itemsize
    return max(1, total)
