"""The teacher cache: the teacher runs once over the training blocks, and every student reads its outputs.

Blocks are stored in shards (`storage`), each written whole with its digest. So a killed capture resumes at the next
shard, and a damaged shard is captured again. Processes share a cache: one fills it while the others wait, and nobody
removes it while it is in use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.distill.cache import encoding
from limbeck.distill.cache.storage import CacheStorage, cache_folder
from limbeck.distill.recipe.cache_form import Form
from limbeck.registry.core.digest import json_digest

if TYPE_CHECKING:
    import torch

    from limbeck.distill.data.blocks import Blocks

SHARD_TOKENS = 2**14

# (block numbers (n,), caches that lack them) -> the arrays to store in each of these caches, from one teacher pass.
TeacherPass = Callable[[np.ndarray, "list[TeacherCache]"], list[dict[str, np.ndarray]]]
# Block numbers (n,) -> the arrays to store, by name: (n, T, ...), or as `encoding.shard_arrays` returns them.
Capture = Callable[[np.ndarray], dict[str, np.ndarray]]


class TeacherCache:
    """The outputs of one teacher over the blocks of one layout, in one form.

    Args:
        settings: what identifies the content besides the form: teacher, tokenizer, blocks, precision. Any other value
            makes another cache.
        shape: number of blocks, tokens per block.
        form: None to store arrays (T, ...) per block under names of the caller's choice.
        about: shown by `limbeck cache list`: the teacher's name, the recipe.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        shape: tuple[int, int],
        form: Form | None = None,
        about: dict[str, str] | None = None,
    ) -> None:
        self.settings = settings | (form._asdict() if form else {})
        self.num_blocks, self.length = shape
        self.form = form
        self.about = about or {}
        self.shard_blocks = max(1, SHARD_TOKENS // self.length)
        key = json_digest(self.settings)
        self.seed = int(key[:16], 16)  # for random draws
        self.storage = CacheStorage(cache_folder(key[:16]))

    @property
    def folder(self) -> Path:
        """The cache's folder; its name is the cache's id."""
        return self.storage.folder

    @property
    def num_shards(self) -> int:
        return -(-self.num_blocks // self.shard_blocks)

    def blocks_of(self, shard: int) -> np.ndarray:
        """The numbers (n,) of a shard's blocks."""
        return np.arange(shard * self.shard_blocks, min((shard + 1) * self.shard_blocks, self.num_blocks))

    def missing_blocks(self) -> int:
        """How many blocks are not captured yet. Does not check the digests of the others."""
        missing = [shard for shard in range(self.num_shards) if not self.storage.is_recorded(shard)]
        return sum(len(self.blocks_of(shard)) for shard in missing)

    def fill(self, capture: Capture, on_blocks: Callable[[int], None] = lambda count: None) -> int:
        """Fill this cache alone, as the function `fill` does. Returns how many blocks it captured."""
        return fill([self], lambda blocks, lacking: [capture(blocks)], on_blocks)

    def load_batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The stored arrays of the blocks at `indices` (n,), as the objectives take them.

        Returns:
            `topk`: ids (n, T, k) int64 and logprobs (n, T, k) float32, most likely token first. `sampled`: ids
            (n, T, m) int64, weights (n, T, m) float32 and entropy (n, T) float32, where m fits the position with the
            most tokens. Both at the form's temperature. Without a form: the arrays by their names.
        """
        places = (divmod(int(index), self.shard_blocks) for index in indices)
        return encoding.batch(self.form, [self.storage.read_block(shard, position) for shard, position in places])

    def lock_against_removal(self) -> None:
        """Keep other processes from removing this cache for as long as this object lives."""
        self.storage.lock_against_removal()

    def capture_seconds(self) -> float:
        """Seconds that the capture of all shards took in any run, with loading the teacher."""
        return sum(self.storage.capture_seconds(shard) for shard in range(self.num_shards))

    def disk_bytes(self) -> int:
        """Bytes of the shards on disk."""
        return self.storage.shard_bytes()


def arrays_to_store(
    blocks: Blocks, indices: np.ndarray, logits: Iterable[torch.Tensor], caches: Sequence[TeacherCache]
) -> list[dict[str, np.ndarray]]:
    """What each cache stores of the blocks at `indices` (n,). Every cache must have a form.

    Args:
        logits: (T, vocab_size) of each block; position t predicts token t + 1.
    """
    arrays_of_caches: list[list[dict[str, np.ndarray]]] = [[] for _ in caches]
    for number, block_logits in zip(indices, logits, strict=True):
        target_mask = np.append(blocks.targets[number, 1:], False)
        for cache, arrays in zip(caches, arrays_of_caches, strict=True):
            assert cache.form is not None
            arrays.append(encoding.block_arrays(cache.form, block_logits, target_mask, (cache.seed, int(number))))
    return [encoding.shard_arrays(arrays) for arrays in arrays_of_caches]


def fill(
    caches: Sequence[TeacherCache],
    run_teacher: TeacherPass,
    on_blocks: Callable[[int], None] = lambda count: None,
) -> int:
    """Capture every missing or damaged shard of several caches over the same blocks, in one teacher pass.

    Args:
        run_teacher: called with block numbers (n,) and the caches that lack them.
        on_blocks: called with the number of blocks done, for a progress bar.

    Returns:
        How many blocks were captured.
    """
    captured = 0
    with ExitStack() as locks:
        for cache in sorted(caches, key=lambda cache: cache.folder):  # in one order, or two processes could deadlock
            cache.folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(cache.storage.lock_for_filling())
            cache.lock_against_removal()
            cache.storage.remove_partial_files()
            _write_settings(cache)
        for shard in range(caches[0].num_shards):
            blocks = caches[0].blocks_of(shard)
            lacking = [cache for cache in caches if not cache.storage.is_intact(shard)]
            if lacking:
                began = time.monotonic()
                arrays_of_caches = run_teacher(blocks, lacking)
                for cache, arrays in zip(lacking, arrays_of_caches, strict=True):
                    cache.storage.write_shard(shard, arrays, time.monotonic() - began)
                captured += len(blocks)
            on_blocks(len(blocks))
    return captured


def _write_settings(cache: TeacherCache) -> None:
    shape = {"blocks": cache.num_blocks, "length": cache.length, "shards": cache.num_shards}
    cache.storage.write_settings({"settings": cache.settings, **shape, "about": cache.about})
