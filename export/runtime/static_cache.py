"""The static cache: buffers that a fused graph's attention writes in place, so that a step copies nothing.

Each slot has a row in the buffers. A run of the graph takes adjacent rows, bound by their address.
GroupQueryAttention reads only the valid part of each row, so rows of different lengths are decoded together without
padding. Its kernels take several rows with more than one new token only if no row has a past: prompts are computed
together from their beginning, but one by one after a reused prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from limbeck.export.runtime.buffers import Buffer, ortvalue_to_numpy
from limbeck.export.runtime.session import grows

if TYPE_CHECKING:
    import onnxruntime as ort

    from limbeck.export.runtime.session import Session
    from limbeck.export.runtime.slot import Slot

MIN_WIDTH = 64  # tokens
MIN_LENGTH_RATIO = 0.75  # prompts share a run if the shortest has at least this share of the longest's length


class StaticCache:
    """The keys and values of slots, for a graph whose metadata say `limbeck.graph` = "fused"; and recurrent states.

    Args:
        session: the loaded artifact.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows: list[Slot | None] = []  # the slot in each row of the buffers; None: the row is free
        self._buffers: list[Buffer] = []  # one for each past input
        self._width = 0  # tokens that a row has room for
        self._bound_step: _BoundStep | None = None

    def add(self, slot: Slot) -> None:
        """Give a new slot a row: a free one, or new rows if there is none."""
        needed = len(slot.prompt) + 1
        if not any(self._rows) and self._width > 4 * max(needed, MIN_WIDTH):  # one long text had widened them
            self._rows, self._buffers, self._width, self._bound_step = [], [], 0, None
        if None not in self._rows:
            self._resize(max(1, 2 * len(self._rows)), max(self._width, self._next_width(needed)))
        slot.row = self._rows.index(None)
        self._rows[slot.row] = slot
        for buffer, item in zip(self._buffers, self._session.past_inputs.values(), strict=True):
            if not grows(item):
                with buffer.edit() as array:
                    array[slot.row] = 0

    def remove(self, slot: Slot) -> None:
        """Free a slot's row."""
        self._rows[slot.row] = None

    def copy_prefix(self, slot: Slot, length: int) -> list[np.ndarray]:
        """Copy the keys and values of a slot's first tokens: (heads, length, head size) for each past input."""
        kv_arrays = []
        for buffer in self._buffers:
            with buffer.edit() as array:
                kv_arrays.append(array[slot.row, :, :length].copy())
        return kv_arrays

    def load_prefix(self, slot: Slot, kv_arrays: Sequence[np.ndarray], length: int) -> None:
        """Extend a slot's cache to the first `length` tokens of `kv_arrays`, arrays as from `copy_prefix`."""
        self._ensure_width(length)
        for buffer, values in zip(self._buffers, kv_arrays, strict=True):
            with buffer.edit() as array:
                array[slot.row, :, slot.length : length] = values[:, slot.length : length]

    def copy_from_slot(self, slot: Slot, other: Slot, length: int) -> None:
        """Extend a slot's cache to the first `length` tokens of another slot."""
        self._ensure_width(length)
        for buffer in self._buffers:
            with buffer.edit() as array:
                array[slot.row, :, slot.length : length] = array[other.row, :, slot.length : length]

    def prefill(self, slots: Sequence[Slot], chunks: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Append a chunk of tokens to each slot; return (V,) float32 logits after the last token of each."""
        self._ensure_width(max(slot.length + len(chunk) for slot, chunk in zip(slots, chunks, strict=True)))
        chunk_of_slot = dict(zip(slots, chunks, strict=True))
        logits: dict[Slot, np.ndarray] = {}
        for group in self._group_slots(chunk_of_slot):
            if len(group) > 1 and group[0].length:  # several slots with a past: one token each
                values = self.step(group, [chunk_of_slot[slot][0] for slot in group])
                logits |= {slot: row.copy() for slot, row in zip(group, values, strict=True)}
            else:
                logits |= self._prefill_group(group, [chunk_of_slot[slot] for slot in group])
        return [logits[slot] for slot in slots]

    def _group_slots(self, chunks: dict[Slot, Sequence[int]]) -> list[list[Slot]]:
        """Group the slots that one run of the graph can take together."""
        groups = self._group_new_slots(chunks)
        with_past = [slot for slot in chunks if slot.length]
        groups += [[slot] for slot in with_past if len(chunks[slot]) > 1]
        single_tokens = [slot for slot in with_past if len(chunks[slot]) == 1]
        return [*groups, single_tokens] if single_tokens else groups

    def _group_new_slots(self, chunks: dict[Slot, Sequence[int]]) -> list[list[Slot]]:
        """Group slots without a past: adjacent rows and chunks of similar length."""
        new_slots = sorted((slot for slot in chunks if not slot.length), key=lambda slot: len(chunks[slot]))
        free_rows = sorted(slot.row for slot in new_slots)
        for slot, row in zip(new_slots, free_rows, strict=True):  # their rows are empty: nothing to move
            slot.row = row
            self._rows[row] = slot
        max_tokens = self._session.max_prefill_tokens
        groups: list[list[Slot]] = []
        for slot in new_slots:
            length = len(chunks[slot])
            group = groups[-1] if groups else []
            fits = bool(group) and (len(group) + 1) * length <= max_tokens
            if fits and group[-1].row + 1 == slot.row and len(chunks[group[0]]) >= MIN_LENGTH_RATIO * length:
                group.append(slot)
            else:
                groups.append([slot])
        return groups

    def _prefill_group(self, slots: Sequence[Slot], chunks: Sequence[Sequence[int]]) -> dict[Slot, np.ndarray]:
        """Run the graph once over one slot, or over slots without a past in adjacent rows, padded on the right."""
        lengths = [len(chunk) for chunk in chunks]
        first = min(lengths) - 1 if self._session.can_choose_logits else 0  # the first position with logits
        value = self._run(slots, chunks, first)
        logits = ortvalue_to_numpy(value)
        return {
            slot: logits[row, length - 1 - first].astype(np.float32)
            for row, (slot, length) in enumerate(zip(slots, lengths, strict=True))
        }

    def verify(self, slot: Slot, tokens: Sequence[int]) -> np.ndarray:
        """Compute tokens after a slot's text, which stays as it is: (len(tokens), V) float32 logits, one after each."""
        self._ensure_width(slot.length + len(tokens))
        value = self._run([slot], [tokens], 0)
        return ortvalue_to_numpy(value)[0].astype(np.float32)

    def _run(self, slots: Sequence[Slot], chunks: Sequence[Sequence[int]], first: int) -> ort.OrtValue:
        """Run the graph over a chunk of each slot: (B, T - first, V) logits from position `first` of the chunks on."""
        session, start = self._session, slots[0].length
        lengths = np.array([len(chunk) for chunk in chunks])[:, None]
        new = int(lengths.max())
        tokens = np.zeros((len(slots), new), np.int64)
        for row, chunk in zip(tokens, chunks, strict=True):
            row[: len(chunk)] = chunk
        arrays = {
            "input_ids": tokens,
            "attention_mask": (np.arange(start + new) < start + lengths).astype(np.int64),
            "position_ids": np.broadcast_to(np.arange(start + first, start + new), (len(slots), new - first)),
        }
        binding = session.onnx_session.io_binding()
        for name in session.input_names:
            binding.bind_cpu_input(name, np.ascontiguousarray(arrays[name]))
        binding.bind_output("logits", "cpu")
        for buffer, past, present in zip(self._buffers, session.past_inputs, session.present_names, strict=True):
            buffer.bind(binding, past, present, slots[0].row, len(slots))
        session.onnx_session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    def step(self, slots: Sequence[Slot], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each slot; return (n, V) float32 logits, which the next step overwrites."""
        total = max(slot.length for slot in slots) + 1
        self._ensure_width(total)
        if self._bound_step is None or self._bound_step.slots != slots:
            first = self._make_contiguous(slots)
            self._bound_step = _BoundStep(self._session, list(slots), first)
            for buffer, past, present in zip(
                self._buffers, self._session.past_inputs, self._session.present_names, strict=True
            ):
                buffer.bind(self._bound_step.binding, past, present, first, len(slots))
        return self._bound_step.run(tokens, total)

    def _make_contiguous(self, slots: Sequence[Slot]) -> int:
        """Move slots so that these are in adjacent rows; return the first row. Copies as few rows as possible."""
        rows = [slot.row for slot in slots]
        if max(rows) - min(rows) + 1 == len(rows):
            return min(rows)
        outside = [slot for slot in slots if slot.row >= len(slots)]
        holes = sorted(set(range(len(slots))) - set(rows))
        moves = [(slot, self._rows[hole], hole) for slot, hole in zip(outside, holes, strict=True)]
        for buffer, item in zip(self._buffers, self._session.past_inputs.values(), strict=True):
            with buffer.edit() as array:
                for slot, other, hole in moves:
                    displaced = _used_part(array[hole], item, other).copy() if other else None
                    _used_part(array[hole], item, slot)[:] = _used_part(array[slot.row], item, slot)
                    if other is not None:
                        _used_part(array[slot.row], item, other)[:] = displaced
        for slot, other, hole in moves:
            self._rows[hole], self._rows[slot.row] = slot, other
            if other:
                other.row = slot.row
            slot.row = hole
        return 0

    def _ensure_width(self, length: int) -> None:
        """Make room for `length` tokens in each row."""
        if length > self._width:
            self._resize(len(self._rows), self._next_width(length))

    def _next_width(self, length: int) -> int:
        """The width for rows of `length` tokens: a power of 2, so that a growing row is rarely copied."""
        return max(length, min(self._session.max_length, max(MIN_WIDTH, 2 ** (length - 1).bit_length())))

    def _resize(self, rows: int, width: int) -> None:
        """Replace the buffers by larger or smaller ones, one at a time, so that only one exists twice."""
        session = self._session
        self._buffers = self._buffers or [None] * len(session.past_inputs)  # type: ignore[list-item]
        for index, item in enumerate(session.past_inputs.values()):
            old = self._buffers[index]
            shape = [rows, *item.shape[1:]]
            if grows(item):
                shape[2] = width
            elif old and old.shape[0] == rows:
                continue
            new = Buffer(tuple(shape), session.numpy_type(item), session.device)
            if not grows(item):
                with new.edit() as after:
                    after[:] = 0
            if any(slot and slot.length for slot in self._rows):
                with old.edit() as before, new.edit() as after:
                    for row, slot in enumerate(self._rows):
                        if slot:
                            _used_part(after[row], item, slot)[:] = _used_part(before[row], item, slot)
            self._buffers[index] = new
        self._rows += [None] * (rows - len(self._rows))
        self._width, self._bound_step = width, None


def _used_part(row: np.ndarray, item: ort.NodeArg, slot: Slot) -> np.ndarray:
    """View what a slot uses of its row of a buffer: the tokens so far, or all of a recurrent state."""
    return row[:, : slot.length] if grows(item) else row


class _BoundStep:
    """The inputs and outputs of one-token runs over the same rows: bound once, filled at each step."""

    def __init__(self, session: Session, slots: list[Slot], first: int) -> None:
        count = len(slots)
        self.slots = slots
        self.binding = session.onnx_session.io_binding()
        self._onnx_session = session.onnx_session
        order = [slot.row - first for slot in slots]
        self._order = (
            None if order == list(range(count)) else np.array(order)
        )  # None: the slots are in the order of their rows
        self._tokens, self._positions = np.zeros((count, 1), np.int64), np.zeros((count, 1), np.int64)
        self._logits = np.empty((count, 1, session.vocab_size), session.logits_type)
        self._range = np.zeros(0, np.int64)
        self._mask = np.zeros(0, np.int64)
        for name, array in (("input_ids", self._tokens), ("position_ids", self._positions)):
            if name in session.input_names:
                self.binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        logits = self._logits
        self.binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)

    def run(self, tokens: Sequence[int], longest: int) -> np.ndarray:
        """Run one step; `longest` is the length of the longest row, its new token included.

        Returns (n, V) float32 logits in the order of the slots.
        """
        count, order = len(self.slots), self._order
        rows = slice(None) if order is None else order
        self._tokens[rows, 0] = tokens
        self._positions[rows, 0] = [slot.length for slot in self.slots]
        if longest > len(self._range):
            self._range = np.arange(2 * longest)
            self._mask = np.empty(count * len(self._range), np.int64)
        mask = self._mask[: count * longest].reshape(count, longest)
        np.less_equal(self._range[:longest], self._positions, out=mask)
        self.binding.bind_input("attention_mask", "cpu", 0, np.int64, mask.shape, self._mask.ctypes.data)
        self._onnx_session.run_with_iobinding(self.binding)
        logits = self._logits[:, 0] if order is None else self._logits[order, 0]
        return logits.astype(np.float32, copy=False)
