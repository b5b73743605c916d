"""The teacher caches that are kept on this machine: what each holds, whether it is whole, how it is removed."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.distill.cache.teacher_cache import CACHES, is_shard_intact
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home


class CacheInfo(NamedTuple):
    """One cache.

    Attributes:
        settings: what identifies its content.
        about: the teacher's name, and the recipe that used it last.
        tokens: in all of it; `shards` likewise, of which `captured` are there.
        used: when a run last asked for it.
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
        """In words: `sampled 12`, `topk 32 at temperature 2`, `chunks`."""
        if "size" not in self.settings:
            return str(self.settings.get("kind", "unknown"))
        temperature = self.settings["temperature"]
        at = f" at temperature {temperature:g}" if temperature != 1.0 else ""
        return f"{self.settings['kind']} {self.settings['size']}{at}"

    @property
    def bytes_per_token(self) -> float | None:
        """Of the shards that are there."""
        share = self.captured / self.shards if self.shards else 0
        return self.disk_bytes / (self.tokens * share) if share else None

    def damaged_shards(self) -> list[str]:
        """The shards that are recorded and are not what was written; reads all of them."""
        return [shard for shard in _recorded_shards(self.folder) if not is_shard_intact(self.folder, int(shard))]


def list_caches() -> list[CacheInfo]:
    """Every cache below `home()`, the one used last first."""
    folders = (path for path in (home() / CACHES).glob("*") if path.is_dir() and not path.name.startswith("."))
    return sorted((_read(folder) for folder in folders), key=lambda cache: cache.last_used, reverse=True)


def find_caches(ids: Iterable[str]) -> list[CacheInfo]:
    """The caches whose id begins with one of `ids`. Raises BadInput where none or several do."""
    chosen, every = [], list_caches()
    for wanted in ids:
        found = [cache for cache in every if cache.id.startswith(wanted)]
        if len(found) != 1:
            what = f"begins {len(found)} caches" if found else "is no teacher cache here"
            raise BadInput(f"{wanted!r} {what}", fix="see their ids: limbeck cache list")
        chosen += found
    return chosen


def remove_cache(cache: CacheInfo) -> bool:
    """Remove a cache from the disk; not where a run fills it or reads it, which False tells."""
    from filelock import FileLock, Timeout

    lock = FileLock(cache.folder / ".lock", timeout=0)
    try:
        with lock, open(cache.folder / ".held", "a") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = cache.folder.with_name(f".{cache.id}.removed")
            cache.folder.rename(gone)
            shutil.rmtree(gone)
    except (Timeout, BlockingIOError):
        return False
    return True


def _recorded_shards(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("[0-9]*.json"))


def _read(folder: Path) -> CacheInfo:
    description = folder / "settings.json"
    try:
        told = json.loads(description.read_text())
        told = told if "settings" in told else {}
    except (OSError, ValueError):
        told = {}
    return CacheInfo(
        folder,
        told.get("settings", {}),
        told.get("about", {}),
        told.get("blocks", 0) * told.get("length", 0),
        told.get("shards", 0),
        len(_recorded_shards(folder)),
        sum(path.stat().st_size for path in folder.iterdir()),
        datetime.fromtimestamp((description if description.exists() else folder).stat().st_mtime, UTC),
    )
