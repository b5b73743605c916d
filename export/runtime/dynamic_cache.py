"""The cache of a graph that gives a longer cache than it takes: present = past and new, as optimum exports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from limbeck.export.runtime.buffers import array_of

if TYPE_CHECKING:
    from limbeck.export.runtime.session import Session
    from limbeck.export.runtime.slot import Slot


class Grown:
    """The cached keys and values of slots. A run's output is the next run's input as it is.

    Rows that are decoded together begin with padding where they are shorter than the longest. They are put
    together anew only where rows join or leave.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._alone: dict[Slot, list[ort.OrtValue]] = {}  # caches of one row each
        self._together: list[Slot] = []  # the rows of `_cache`, in its order
        self._cache: list[ort.OrtValue] = []
        self._width = 0  # its length

    def add(self, slot: Slot) -> None:
        """Take a new slot, which has no tokens."""
        self._alone[slot] = self._session.empty_cache(1)

    def remove(self, slot: Slot) -> None:
        """Let a slot go."""
        self._alone.pop(slot, None)  # one of several that are together goes with the next step

    def copy(self, slot: Slot, length: int) -> list[np.ndarray]:
        """(heads, length, size) keys or values of a slot's first tokens, one for each past input."""
        return [part[..., :length, :].copy() for part in self._parts(slot)]

    def extend(self, slot: Slot, parts: Sequence[np.ndarray], length: int) -> None:
        """Let a slot hold `length` tokens, those of `parts`, as `copy` gives them."""
        values = [part[None, ..., :length, :].copy() for part in parts]
        self._alone[slot] = [ort.OrtValue.ortvalue_from_numpy(value, self._session.device, 0) for value in values]

    def share(self, slot: Slot, other: Slot, length: int) -> None:
        """Let a slot hold the first `length` tokens of another."""
        self.extend(slot, self._parts(other), length)

    def read(self, slots: Sequence[Slot], pieces: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Give each slot several tokens: for each, (V,) float32 logits of what follows the last."""
        found = []
        for slot, piece in zip(slots, pieces, strict=True):
            tokens, end = np.array([piece], np.int64), slot.length + len(piece)
            mask, places = np.ones((1, end), np.int64), np.arange(slot.length, end)[None]
            logits, self._alone[slot] = self._session.forward(tokens, mask, places, self._alone[slot])
            found.append(logits[0, -1].astype(np.float32))
        return found

    def step(self, slots: Sequence[Slot], tokens: Sequence[int]) -> np.ndarray:
        """Give each slot one token: (n, V) float32 logits of what follows."""
        if slots != self._together:
            self._gather(list(slots))
        lengths = np.array([slot.length for slot in slots])
        mask = (np.arange(self._width + 1) >= self._width - lengths[:, None]).astype(np.int64)
        column = np.array(tokens, np.int64)[:, None]
        logits, self._cache = self._session.forward(column, mask, lengths[:, None], self._cache)
        self._width += 1
        return logits[:, -1].astype(np.float32, copy=False)

    def _parts(self, slot: Slot) -> list[np.ndarray]:
        """Views of what a slot holds."""
        if slot in self._alone:
            return [array_of(value)[0] for value in self._alone[slot]]
        row, start = self._together.index(slot), self._width - slot.length
        return [array_of(value)[row][..., start:, :] for value in self._cache]

    def _gather(self, slots: list[Slot]) -> None:
        """One cache of these slots, each padded at its beginning to the longest; the others have one each."""
        parts = {slot: self._parts(slot) for slot in slots}
        for slot in self._together:
            if slot not in parts and slot.held:
                self.extend(slot, self._parts(slot), slot.length)
        width = max(slot.length for slot in slots)
        cache = []
        for layer, first in enumerate(parts[slots[0]]):
            whole = np.zeros((len(slots), *first.shape[:-2], width, first.shape[-1]), first.dtype)
            for row, slot in enumerate(slots):
                whole[row, ..., width - slot.length :, :] = parts[slot][layer]
            cache.append(ort.OrtValue.ortvalue_from_numpy(whole, self._session.device, 0))
        for slot in slots:
            self._alone.pop(slot, None)
        self._together, self._cache, self._width = slots, cache, width
