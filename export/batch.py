"""Rows that are decoded together, each at its own length; they join and leave between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from export.runtime import Runtime


@dataclass(eq=False)
class Slot:
    """A row of a batch, held from `begin` to `end`."""

    prompt: list[int]
    length: int = 0  # tokens in the cache
    cache: list[np.ndarray] = field(default_factory=list)  # for each past input, without its batch axis

    @property
    def unread(self) -> int:
        """Prompt tokens that the model has not seen yet."""
        return max(0, len(self.prompt) - self.length)


class Batch:
    """The rows that one loaded artifact decodes at present, and their caches.

    Rows are told apart by their `Slot`. What a row's logits are does not depend on the other rows (but for int8
    activations, whose scales do). Not for several threads at once.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._together: list[Slot] = []  # the rows of `_cache`, in its order
        self._cache: list[ort.OrtValue] = []
        self._width = 0  # its length; shorter rows begin with padding

    def begin(self, prompt: Sequence[int], room: int) -> Slot:
        """A new row that reads `prompt` and then takes at most `room` tokens. Nothing is computed yet."""
        return Slot(list(prompt))

    def read(self, slots: Sequence[Slot], most: int) -> list[np.ndarray | None]:
        """Let each slot see at most `most` more tokens of its prompt.

        Returns:
            for each slot, (V,) float32 logits after the last token of its prompt; None while some is unread.
        """
        return [self._read(slot, most) for slot in slots]

    def _read(self, slot: Slot, most: int) -> np.ndarray | None:
        runtime = self._runtime
        piece = slot.prompt[slot.length : slot.length + most]
        tokens = np.array([piece], np.int64)
        end = slot.length + len(piece)
        cache = [ort.OrtValue.ortvalue_from_numpy(part[None]) for part in slot.cache] or runtime.empty_cache(1)
        logits, present = runtime.forward(tokens, np.ones((1, end), np.int64), np.arange(slot.length, end)[None], cache)
        slot.cache, slot.length = [value.numpy()[0] for value in present], end
        return None if slot.unread else logits[0, -1].astype(np.float32)

    def step(self, slots: Sequence[Slot], tokens: Sequence[int]) -> np.ndarray:
        """Give each slot, whose prompt is read, its next token: (n, V) float32 logits of what follows it."""
        if list(slots) != self._together:
            self._gather(list(slots))
        lengths = np.array([slot.length for slot in slots])
        mask = (np.arange(self._width + 1) >= self._width - lengths[:, None]).astype(np.int64)
        logits, self._cache = self._runtime.forward(
            np.array(tokens, np.int64)[:, None], mask, lengths[:, None], self._cache
        )
        self._width += 1
        for slot in slots:
            slot.length += 1
        return logits[:, -1].astype(np.float32, copy=False)

    def end(self, slot: Slot) -> None:
        """Let a row go; the next step is without it."""
        slot.cache = []

    def _gather(self, slots: list[Slot]) -> None:
        """One cache of these slots, each padded at its beginning to the longest."""
        for row, slot in enumerate(self._together):
            slot.cache = [value.numpy()[row, :, self._width - slot.length :] for value in self._cache]
        self._together, self._width = slots, max((slot.length for slot in slots), default=0)
        self._cache = []
        for layer in range(len(slots[0].cache) if slots else 0):
            heads, _, size = slots[0].cache[layer].shape
            whole = np.zeros((len(slots), heads, self._width, size), slots[0].cache[layer].dtype)
            for row, slot in enumerate(slots):
                whole[row, :, self._width - slot.length :] = slot.cache[layer]
            self._cache.append(ort.OrtValue.ortvalue_from_numpy(whole))
        for slot in slots:
            slot.cache = []
