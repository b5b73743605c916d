"""The dynamic cache: for a graph whose outputs are the past and the new tokens, as optimum exports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from limbeck.export.runtime.buffers import ortvalue_to_numpy

if TYPE_CHECKING:
    from limbeck.export.runtime.session import Session
    from limbeck.export.runtime.slot import Slot


class DynamicCache:
    """The keys and values of slots; the output of a run is the input of the next one, without a copy.

    Rows that are decoded together are padded on the left to the longest. The batched cache is rebuilt only when rows
    join or leave.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._single_caches: dict[Slot, list[ort.OrtValue]] = {}  # slot -> its cache, a batch of 1
        self._batched_slots: list[Slot] = []  # the rows of `_batched_cache`, in order
        self._batched_cache: list[ort.OrtValue] = []
        self._batched_length = 0  # tokens, padding included

    def add(self, slot: Slot) -> None:
        """Add a slot, with no tokens yet."""
        self._single_caches[slot] = self._session.empty_cache(1)

    def remove(self, slot: Slot) -> None:
        """Remove a slot; a row of the batched cache stays until the next step."""
        self._single_caches.pop(slot, None)

    def copy_prefix(self, slot: Slot, length: int) -> list[np.ndarray]:
        """Copy the keys and values of a slot's first tokens: (heads, length, head size) for each past input."""
        return [part[..., :length, :].copy() for part in self._kv_views(slot)]

    def load_prefix(self, slot: Slot, kv_arrays: Sequence[np.ndarray], length: int) -> None:
        """Set a slot's cache to the first `length` tokens of `kv_arrays`, arrays as from `copy_prefix`."""
        values = [part[None, ..., :length, :].copy() for part in kv_arrays]
        self._single_caches[slot] = [
            ort.OrtValue.ortvalue_from_numpy(value, self._session.device, 0) for value in values
        ]

    def copy_from_slot(self, slot: Slot, other: Slot, length: int) -> None:
        """Set a slot's cache to the first `length` tokens of another slot."""
        self.load_prefix(slot, self._kv_views(other), length)

    def prefill(self, slots: Sequence[Slot], chunks: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Append a chunk of tokens to each slot; return (V,) float32 logits after the last token of each."""
        found = []
        for slot, chunk in zip(slots, chunks, strict=True):
            tokens, end = np.array([chunk], np.int64), slot.length + len(chunk)
            mask, positions = np.ones((1, end), np.int64), np.arange(slot.length, end)[None]
            cache = self._single_caches[slot]
            logits, self._single_caches[slot] = self._session.forward(tokens, mask, positions, cache)
            found.append(logits[0, -1].astype(np.float32))
        return found

    def step(self, slots: Sequence[Slot], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each slot; return (n, V) float32 logits of the next token."""
        if slots != self._batched_slots:
            self._batch_slots(list(slots))
        lengths = np.array([slot.length for slot in slots])
        mask = (np.arange(self._batched_length + 1) >= self._batched_length - lengths[:, None]).astype(np.int64)
        column = np.array(tokens, np.int64)[:, None]
        logits, self._batched_cache = self._session.forward(column, mask, lengths[:, None], self._batched_cache)
        self._batched_length += 1
        return logits[:, -1].astype(np.float32, copy=False)

    def _kv_views(self, slot: Slot) -> list[np.ndarray]:
        """Views of a slot's keys and values, (heads, length, head size) for each past input."""
        if slot in self._single_caches:
            return [ortvalue_to_numpy(value)[0] for value in self._single_caches[slot]]
        row, start = self._batched_slots.index(slot), self._batched_length - slot.length
        return [ortvalue_to_numpy(value)[row][..., start:, :] for value in self._batched_cache]

    def _batch_slots(self, slots: list[Slot]) -> None:
        """Put these slots into one cache, padded on the left to the longest; move all others to single caches."""
        parts = {slot: self._kv_views(slot) for slot in slots}
        for slot in self._batched_slots:
            if slot not in parts and slot.is_active:
                self.load_prefix(slot, self._kv_views(slot), slot.length)
        width = max(slot.length for slot in slots)
        cache = []
        for layer, first in enumerate(parts[slots[0]]):
            whole = np.zeros((len(slots), *first.shape[:-2], width, first.shape[-1]), first.dtype)
            for row, slot in enumerate(slots):
                whole[row, ..., width - slot.length :, :] = parts[slot][layer]
            cache.append(ort.OrtValue.ortvalue_from_numpy(whole, self._session.device, 0))
        for slot in slots:
            self._single_caches.pop(slot, None)
        self._batched_slots, self._batched_cache, self._batched_length = slots, cache, width
