"""The teacher cache: the teacher runs once over the training blocks, every student reads what it said.

At each position the `top_k` most likely tokens and their log-probabilities are kept, in shards of blocks.
A shard is written whole and recorded with its digest, so a killed capture goes on where it stopped and a
damaged shard is captured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from registry.digest import file_digest, json_digest
from registry.home import home, written_whole

if TYPE_CHECKING:
    import torch

SHARD_BLOCKS = 128

Capture = Callable[
    [np.ndarray], dict[str, np.ndarray]
]  # the numbers of blocks (n,) -> arrays (n, T, ...) of a stored form


class TeacherCache:
    """Stored top-k log-probabilities of one teacher over the blocks of one layout.

    Args:
        settings: what identifies the content: teacher digest, blocks digest, top_k. Another value of any
            of them is another cache.
        blocks: how many.
        vocab_size: decides the width of the stored ids.
    """

    def __init__(self, settings: dict[str, str | int], blocks: int, vocab_size: int) -> None:
        self.settings = settings
        self.blocks = blocks
        self.id_dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        self.folder = home() / "teacher-cache" / json_digest(settings)[:16]
        self._open: dict[int, dict[str, np.ndarray]] = {}

    @property
    def shards(self) -> int:
        return -(-self.blocks // SHARD_BLOCKS)

    def _files(self, shard: int) -> dict[str, Path]:
        return {part: self.folder / f"{shard:05d}.{part}.npy" for part in ("ids", "logprobs")}

    def _is_whole(self, shard: int) -> bool:
        record = self.folder / f"{shard:05d}.json"
        try:
            recorded = json.loads(record.read_text())
            return all(file_digest(path) == recorded[part] for part, path in self._files(shard).items())
        except (OSError, ValueError, KeyError):
            return False

    def fill(self, capture: Capture, on_blocks: Callable[[int], None] = lambda count: None) -> int:
        """Capture every shard that is not there or is damaged; returns the blocks captured.

        Args:
            capture: numbers of blocks (n,) -> ids (n, T, top_k) and log-probabilities (n, T, top_k), by name.
            on_blocks: told how many blocks are done, for a progress bar.
        """
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        captured = 0
        with FileLock(self.folder / ".lock"):
            (self.folder / "settings.json").write_text(json.dumps(self.settings, indent=1) + "\n")
            for shard in range(self.shards):
                blocks = np.arange(shard * SHARD_BLOCKS, min((shard + 1) * SHARD_BLOCKS, self.blocks))
                if not self._is_whole(shard):
                    began = time.monotonic()
                    arrays = capture(blocks)
                    self._write(shard, arrays["ids"], arrays["logprobs"], time.monotonic() - began)
                    captured += len(blocks)
                on_blocks(len(blocks))
        return captured

    def _write(self, shard: int, ids: np.ndarray, logprobs: np.ndarray, seconds: float) -> None:
        arrays = {"ids": ids.astype(self.id_dtype), "logprobs": logprobs.astype(np.float16)}
        files = self._files(shard)
        for part, path in files.items():
            with written_whole(path) as temporary, open(temporary, "wb") as file:
                np.save(file, arrays[part])
        # The record comes last: a shard without one is not there.
        with written_whole(self.folder / f"{shard:05d}.json") as temporary:
            digests = {part: file_digest(path) for part, path in files.items()}
            temporary.write_text(json.dumps({**digests, "seconds": seconds}) + "\n")

    def rows(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The stored form of the blocks at `indices` (n,), by the names of `objectives.TopK`.

        Returns:
            ids (n, T, top_k) int64 and logprobs (n, T, top_k) float32.
        """
        import torch

        rows = [self._row(int(index)) for index in indices]
        return {
            "ids": torch.from_numpy(np.stack([row["ids"] for row in rows]).astype(np.int64)),
            "logprobs": torch.from_numpy(np.stack([row["logprobs"] for row in rows]).astype(np.float32)),
        }

    def _row(self, index: int) -> dict[str, np.ndarray]:
        shard, row = divmod(index, SHARD_BLOCKS)
        if shard not in self._open:
            files = self._files(shard)
            self._open[shard] = {part: np.load(file, mmap_mode="r", allow_pickle=False) for part, file in files.items()}
        return {part: array[row] for part, array in self._open[shard].items()}

    def seconds(self) -> float:
        """Seconds that the capture of all shards took, whichever run made them; loading the teacher included."""
        records = (self.folder / f"{shard:05d}.json" for shard in range(self.shards))
        return sum(json.loads(record.read_text()).get("seconds", 0.0) for record in records)

    def disk_bytes(self) -> int:
        """Bytes that the cache takes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.npy"))
