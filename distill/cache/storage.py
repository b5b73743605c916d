"""The files of a teacher cache: shards with their digests, settings and locks, in a folder below `home()`.

Only this module reads and writes them. To store caches elsewhere, such as on S3, replace `CacheStorage` and
`list_folders`.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

from limbeck.registry.core.digest import file_digest
from limbeck.registry.core.errors import DamagedArtifact
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.terminal import print_status

CACHES = "teacher-cache"  # the folder below home()


def cache_folder(cache_id: str) -> Path:
    """The folder of the cache with this id."""
    return home() / CACHES / cache_id


def list_folders() -> list[Path]:
    """The folders of all caches."""
    return [path for path in (home() / CACHES).glob("*") if path.is_dir() and not path.name.startswith(".")]


class CacheStorage:
    """The folder of one cache.

    Holds for each shard a safetensors file and a record of its SHA-256 digest and capture time. The record is written
    last, so a shard without one does not count.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._readers: dict[int, _ShardReader] = {}
        self._use_lock: IO[str] | None = None

    # --- shards

    def write_shard(self, shard: int, arrays: Mapping[str, np.ndarray], seconds: float) -> None:
        """Write a shard and its record; `seconds` is how long its capture took."""
        from safetensors.numpy import save_file

        with atomic_write(self._shard_path(shard)) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
            digest = file_digest(temporary)
        with atomic_write(self._record_path(shard)) as temporary:
            temporary.write_text(json.dumps({"sha256": digest, "seconds": seconds}) + "\n")
        self._readers.pop(shard, None)

    def read_block(self, shard: int, position: int) -> dict[str, np.ndarray]:
        """The arrays of the block at `position` in a shard. Raises DamagedArtifact if the file cannot be read."""
        if shard not in self._readers:
            self._readers[shard] = _ShardReader(self._shard_path(shard))
        return self._readers[shard].read_block(position)

    def is_recorded(self, shard: int) -> bool:
        """Whether a shard was written completely. Does not check its digest."""
        return self._record_path(shard).exists()

    def is_intact(self, shard: int) -> bool:
        """Whether a shard exists and has the digest of its record. Reads the whole file."""
        try:
            record = json.loads(self._record_path(shard).read_text())
            return bool(file_digest(self._shard_path(shard)) == record["sha256"])
        except (OSError, ValueError, KeyError):
            return False

    def recorded_shards(self) -> list[int]:
        """The numbers of all shards with a record."""
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit())

    def capture_seconds(self, shard: int) -> float:
        """Seconds that the capture of a shard took."""
        return float(json.loads(self._record_path(shard).read_text()).get("seconds", 0.0))

    def shard_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def remove_partial_files(self) -> None:
        """Remove what a killed process left half-written."""
        for path in self.folder.glob(".*.part"):
            path.unlink()

    def _shard_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def _record_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.json"

    # --- settings

    @property
    def _settings_path(self) -> Path:
        return self.folder / "settings.json"

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write what the cache holds. The file's time is when a run last used the cache."""
        with atomic_write(self._settings_path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")

    def read_settings(self) -> dict[str, Any]:
        """What `write_settings` wrote; empty if it cannot be read."""
        try:
            settings = json.loads(self._settings_path.read_text())
        except (OSError, ValueError):
            return {}
        return settings if "settings" in settings else {}

    def last_used(self) -> datetime:
        """When a run last used the cache."""
        path = self._settings_path if self._settings_path.exists() else self.folder
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)

    # --- locks

    @contextmanager
    def lock_for_filling(self) -> Iterator[None]:
        """The exclusive right to fill the cache; waits while another process fills it."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=2)
        except Timeout:
            print_status(f"  teacher cache: another process is filling {self.folder.name}; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def lock_against_removal(self) -> None:
        """Keep other processes from removing the cache for as long as this object lives."""
        if self._use_lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._use_lock = open(self.folder / ".in-use", "a")  # noqa: SIM115 (stays open on purpose)
            fcntl.flock(self._use_lock, fcntl.LOCK_SH)

    def unlock(self) -> None:
        """Let other processes remove the cache."""
        if self._use_lock is not None:
            self._use_lock.close()
            self._use_lock = None

    def remove(self) -> bool:
        """Remove the cache from disk. False, and nothing is removed, if a run fills or reads it."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.folder / ".lock", timeout=0), open(self.folder / ".in-use", "a") as in_use:
                fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                removed = self.folder.with_name(f".{self.folder.name}.removed")
                self.folder.rename(removed)
                shutil.rmtree(removed)
        except (Timeout, BlockingIOError):
            return False
        return True


class _ShardReader:
    """An open, memory-mapped shard file."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise DamagedArtifact(path, [str(error)]) from error
        self.slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        self.entry_starts: np.ndarray | None = None  # of each block, in `entries`
        if "entries" in self.slices:
            sizes = file.get_tensor("sizes")
            self.entry_starts = np.concatenate([[0], np.cumsum(sizes.sum(-1, dtype=np.int64))])

    def read_block(self, position: int) -> dict[str, np.ndarray]:
        arrays = {}
        for name, tensor in self.slices.items():
            if name == "entries" and self.entry_starts is not None:
                start, end = (int(edge) for edge in self.entry_starts[position : position + 2])
                arrays[name] = tensor[start:end]
            else:
                arrays[name] = tensor[position]
        return arrays
