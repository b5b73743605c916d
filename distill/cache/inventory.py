"""The teacher caches on this machine: what each one holds, whether it is complete, and how to remove it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.distill.cache.storage import CacheStorage, list_folders
from limbeck.registry.core.errors import BadInput


class CacheInfo(NamedTuple):
    """One cache.

    Attributes:
        settings: what identifies its content.
        about: the teacher's name, and the recipe that used the cache last.
        tokens: of the complete cache.
        shards: of the complete cache.
        captured: shards on disk.
        last_used: when a run last used it.
    """

    folder: Path
    settings: dict[str, Any]
    about: dict[str, str]
    tokens: int
    shards: int
    captured: int
    disk_bytes: int
    last_used: datetime

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def form(self) -> str:
        """The form as text: `sampled 12`, `topk 32 at temperature 2`, `chunks`."""
        if "size" not in self.settings:
            return str(self.settings.get("kind", "unknown"))
        temperature = self.settings["temperature"]
        suffix = f" at temperature {temperature:g}" if temperature != 1.0 else ""
        return f"{self.settings['kind']} {self.settings['size']}{suffix}"

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes per token of the captured shards; None if there are none."""
        share = self.captured / self.shards if self.shards else 0
        return self.disk_bytes / (self.tokens * share) if share else None

    def damaged_shards(self) -> list[str]:
        """The recorded shards whose digest is wrong. Reads every shard."""
        storage = CacheStorage(self.folder)
        return [f"{shard:05d}" for shard in storage.recorded_shards() if not storage.is_intact(shard)]


def list_caches() -> list[CacheInfo]:
    """Every cache below `home()`, most recently used first."""
    return sorted(map(_cache_info, list_folders()), key=lambda cache: cache.last_used, reverse=True)


def find_caches(ids: Iterable[str]) -> list[CacheInfo]:
    """The caches whose id begins with one of `ids`. Raises BadInput if a prefix matches none or several."""
    chosen, caches = [], list_caches()
    for prefix in ids:
        found = [cache for cache in caches if cache.id.startswith(prefix)]
        if len(found) != 1:
            problem = f"matches {len(found)} teacher caches" if found else "is not a teacher cache on this machine"
            raise BadInput(f"{prefix!r} {problem}", fix="see their ids: limbeck cache list")
        chosen += found
    return chosen


def remove_cache(cache: CacheInfo) -> bool:
    """Remove a cache from disk. False, and nothing is removed, if a run fills or reads it."""
    return CacheStorage(cache.folder).remove()


def _cache_info(folder: Path) -> CacheInfo:
    storage = CacheStorage(folder)
    described = storage.read_settings()
    return CacheInfo(
        folder,
        described.get("settings", {}),
        described.get("about", {}),
        described.get("blocks", 0) * described.get("length", 0),
        described.get("shards", 0),
        len(storage.recorded_shards()),
        storage.total_bytes(),
        storage.last_used(),
    )
