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

import numpy as np

from registry.digest import file_digest, json_digest
from registry.home import home, written_whole

SHARD_BLOCKS = 128

Capture = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class TeacherCache:
    """Stored top-k log-probabilities of one teacher over one array of blocks.

    Args:
        settings: what identifies the content: teacher digest, blocks digest, top_k. Another value of any
            of them is another cache.
        blocks: token ids (N, T) int32.
        vocab_size: decides the width of the stored ids.
    """

    def __init__(self, settings: dict[str, str | int], blocks: np.ndarray, vocab_size: int) -> None:
        self.settings = settings
        self.blocks = blocks
        self.top_k = int(settings["top_k"])
        self.id_dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        self.folder = home() / "teacher-cache" / json_digest(settings)[:16]
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def shards(self) -> int:
        return -(-len(self.blocks) // SHARD_BLOCKS)

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
            capture: blocks (n, T) -> ids (n, T, top_k) and log-probabilities (n, T, top_k).
            on_blocks: told how many blocks are done, for a progress bar.
        """
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        captured = 0
        with FileLock(self.folder / ".lock"):
            (self.folder / "settings.json").write_text(json.dumps(self.settings, indent=1) + "\n")
            for shard in range(self.shards):
                blocks = self.blocks[shard * SHARD_BLOCKS : (shard + 1) * SHARD_BLOCKS]
                if not self._is_whole(shard):
                    began = time.monotonic()
                    ids, logprobs = capture(blocks)
                    self._write(shard, ids, logprobs, time.monotonic() - began)
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

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n, T, top_k) int64 and log-probabilities (n, T, top_k) float32 of the blocks at `indices`."""
        ids, logprobs = [], []
        for index in indices:
            shard, row = divmod(int(index), SHARD_BLOCKS)
            if shard not in self._open:
                files = self._files(shard)
                self._open[shard] = (
                    np.load(files["ids"], mmap_mode="r", allow_pickle=False),
                    np.load(files["logprobs"], mmap_mode="r", allow_pickle=False),
                )
            ids.append(self._open[shard][0][row])
            logprobs.append(self._open[shard][1][row])
        return np.stack(ids).astype(np.int64), np.stack(logprobs).astype(np.float32)

    def seconds(self) -> float:
        """Seconds that the capture of all shards took, whichever run made them; loading the teacher included."""
        records = (self.folder / f"{shard:05d}.json" for shard in range(self.shards))
        return sum(json.loads(record.read_text()).get("seconds", 0.0) for record in records)

    def disk_bytes(self) -> int:
        """Bytes that the cache takes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.npy"))
