"""The teacher cache: the teacher runs once over the training blocks, every student reads what it said.

Shards of blocks lie in one file each, memory-mapped. A shard is written whole and recorded with its digest, so a
killed capture goes on where it stopped and a damaged shard is captured again. Processes share a cache: one fills
it while the others wait, and none is removed while it is read.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from limbeck.distill.cache import encoding
from limbeck.distill.recipe.cache_form import Form
from limbeck.registry.core.digest import file_digest, json_digest
from limbeck.registry.core.errors import DamagedArtifact
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.terminal import print_status

if TYPE_CHECKING:
    import torch

    from limbeck.distill.data.blocks import Blocks

SHARD_TOKENS = 2**14
CACHES = "teacher-cache"  # the folder below home()

# The numbers of blocks (n,), and the caches that lack them -> what each stores of them, from one pass of the teacher.
TeacherPass = Callable[[np.ndarray, "list[TeacherCache]"], list[dict[str, np.ndarray]]]
# The numbers of blocks (n,) -> what is stored of them, by name: (n, T, ...), or as `stored.shard_arrays` gives it.
Capture = Callable[[np.ndarray], dict[str, np.ndarray]]


class TeacherCache:
    """What one teacher said over the blocks of one layout, in one form.

    Args:
        settings: what identifies the content beside the form: teacher, tokenizer, blocks, precision. Another value
            of any of them is another cache.
        shape: blocks, and tokens a block.
        form: None for arrays (T, ...) a block by names of one's own.
        about: told by `limbeck cache list`: the teacher's name, the recipe.
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
        self.seed = int(key[:16], 16)  # of what is drawn at random
        self.folder = home() / CACHES / key[:16]
        self._open: dict[int, Any] = {}
        self._lock_file: IO[str] | None = None

    @property
    def num_shards(self) -> int:
        return -(-self.num_blocks // self.shard_blocks)

    def blocks_of(self, shard: int) -> np.ndarray:
        return np.arange(shard * self.shard_blocks, min((shard + 1) * self.shard_blocks, self.num_blocks))

    def missing_blocks(self) -> int:
        """Blocks that are not captured yet, as far as the records tell; no checksum is taken."""
        there = (_record(self.folder, shard).exists() for shard in range(self.num_shards))
        return sum(len(self.blocks_of(shard)) for shard, is_there in enumerate(there) if not is_there)

    def fill(self, capture: Capture, on_blocks: Callable[[int], None] = lambda count: None) -> int:
        """`fill` of this cache alone; returns the blocks captured."""
        return fill([self], lambda blocks, lacking: [capture(blocks)], on_blocks)

    def write(self, shard: int, arrays: dict[str, np.ndarray], seconds: float) -> None:
        """Write a shard; `seconds` is what its capture took."""
        from safetensors.numpy import save_file

        path = _file(self.folder, shard)
        with atomic_write(path) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
            digest = file_digest(temporary)
        # The record comes last: a shard without one is not there.
        with atomic_write(_record(self.folder, shard)) as temporary:
            temporary.write_text(json.dumps({"sha256": digest, "seconds": seconds}) + "\n")
        self._open.pop(shard, None)

    def load_batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """What is stored of the blocks at `indices` (n,), as the objectives take it.

        Returns:
            Of `topk`: ids (n, T, k) int64 and logprobs (n, T, k) float32, the likeliest token first. Of `sampled`:
            ids (n, T, m) int64, weights (n, T, m) float32 and entropy (n, T) float32, where m is what the fullest
            position needs. Both at the form's temperature. Else the arrays by their names.
        """
        return encoding.batch(self.form, [self._block(int(index)) for index in indices])

    def _block(self, index: int) -> dict[str, np.ndarray]:
        shard, place = divmod(index, self.shard_blocks)
        if shard not in self._open:
            self._open[shard] = _Shard(_file(self.folder, shard))
        return self._open[shard].block(place)

    def lock_against_removal(self) -> None:
        """Keep others from removing this cache for as long as this object lives."""
        if self._lock_file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(self.folder / ".held", "a")  # noqa: SIM115 (open on purpose)
            fcntl.flock(self._lock_file, fcntl.LOCK_SH)

    def capture_seconds(self) -> float:
        """Seconds that the capture of all shards took, whichever run made them; loading the teacher included."""
        records = (_record(self.folder, shard) for shard in range(self.num_shards))
        return sum(json.loads(record.read_text()).get("seconds", 0.0) for record in records)

    def disk_bytes(self) -> int:
        """Bytes that the cache takes on disk."""
        return disk_bytes(self.folder)


class _Shard:
    """A shard's file, open for reading."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise DamagedArtifact(path, [str(error)]) from error
        self.slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        self.starts: np.ndarray | None = None
        if "entries" in self.slices:
            sizes = file.get_tensor("sizes")
            self.starts = np.concatenate([[0], np.cumsum(sizes.sum(-1, dtype=np.int64))])

    def block(self, place: int) -> dict[str, np.ndarray]:
        arrays = {}
        for name, piece in self.slices.items():
            if name == "entries" and self.starts is not None:
                arrays[name] = piece[int(self.starts[place]) : int(self.starts[place + 1])]
            else:
                arrays[name] = piece[place]
        return arrays


def arrays_to_store(
    blocks: Blocks, indices: np.ndarray, logits: Iterable[torch.Tensor], caches: Sequence[TeacherCache]
) -> list[dict[str, np.ndarray]]:
    """What each of several caches, which have a form, stores of the blocks at `indices` (n,).

    Args:
        logits: (T, vocab_size) of each of the blocks; a position tells of the next token.
    """
    said: list[list[dict[str, np.ndarray]]] = [[] for _ in caches]
    for number, of_block in zip(indices, logits, strict=True):
        wanted = np.append(blocks.targets[number, 1:], False)
        for cache, arrays in zip(caches, said, strict=True):
            assert cache.form is not None
            arrays.append(encoding.block_arrays(cache.form, of_block, wanted, (cache.seed, int(number))))
    return [encoding.shard_arrays(arrays) for arrays in said]


def fill(
    caches: Sequence[TeacherCache],
    capture: Callable[[np.ndarray, list[TeacherCache]], list[dict[str, np.ndarray]]],
    on_blocks: Callable[[int], None] = lambda count: None,
) -> int:
    """Capture every shard that is not there or is damaged, for several caches over the same blocks in one pass.

    Args:
        capture: numbers of blocks (n,) and the caches that lack them -> what each of these stores of them.
        on_blocks: told how many blocks are done, for a progress bar.

    Returns:
        The blocks captured.
    """
    captured = 0
    with ExitStack() as locks:
        for cache in sorted(caches, key=lambda cache: cache.folder):  # in one order, or two processes block each other
            cache.folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_filling(cache.folder))
            cache.lock_against_removal()
            for part in cache.folder.glob(".*.part"):  # of a run that was killed
                part.unlink()
            _describe(cache)
        for shard in range(caches[0].num_shards):
            blocks = caches[0].blocks_of(shard)
            lacking = [cache for cache in caches if not is_shard_intact(cache.folder, shard)]
            if lacking:
                began = time.monotonic()
                made = capture(blocks, lacking)
                for cache, arrays in zip(lacking, made, strict=True):
                    cache.write(shard, arrays, time.monotonic() - began)
                captured += len(blocks)
            on_blocks(len(blocks))
    return captured


@contextmanager
def _filling(folder: Path) -> Iterator[None]:
    """The right to fill a cache, once no other process is at it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=2)
    except Timeout:
        print_status(f"  teacher cache: {folder.name} is being filled by another process; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _describe(cache: TeacherCache) -> None:
    about = {"settings": cache.settings, "blocks": cache.num_blocks, "length": cache.length, "shards": cache.num_shards}
    with atomic_write(cache.folder / "settings.json") as temporary:  # its time tells when the cache was last used
        temporary.write_text(json.dumps(about | {"about": cache.about}, indent=1) + "\n")


# --- files of a cache's folder


def _file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def _record(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.json"


def is_shard_intact(folder: Path, shard: int) -> bool:
    """Whether a shard is there and is what was written."""
    try:
        return bool(file_digest(_file(folder, shard)) == json.loads(_record(folder, shard).read_text())["sha256"])
    except (OSError, ValueError, KeyError):
        return False


def disk_bytes(folder: Path) -> int:
    """Bytes of the shards in a cache's folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
