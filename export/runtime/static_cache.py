"""The cache of a fused graph: buffers that its attention writes in place, so that a step copies nothing.

Each row of the buffers is a slot's. The rows that a run of the graph takes stand side by side and are bound by
their address. GroupQueryAttention reads of each row as much as the row holds, so rows of unequal length are decoded
together and nothing is padded. Its kernels take several rows with more than one new token only where no row has a
past: prompts are read together from their beginning, and row by row after a prefix that was there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from limbeck.export.runtime.buffers import Buffer, ortvalue_to_numpy

if TYPE_CHECKING:
    from limbeck.export.runtime.session import Session
    from limbeck.export.runtime.slot import Slot

MIN_WIDTH = 64  # tokens
MAX_PREFILL_TOKENS = 1024  # tokens of prompts read in one run: more are no faster
MIN_LENGTH_RATIO = 0.75  # prompts are read together where the shorter has at least this share of the longer


class StaticCache:
    """The cached keys and values of slots, for a graph with `limbeck.graph` = "fused"."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows: list[Slot | None] = []  # who has each row of the buffers; None where it is free
        self._buffers: list[Buffer] = []  # for each past input
        self._width = 0  # tokens that a row has place for
        self._bound_step: _BoundStep | None = None

    def add(self, slot: Slot) -> None:
        """Give a new slot a row. A free one is taken first, and nothing moves."""
        needed = len(slot.prompt) + 1
        if not any(self._rows) and self._width > 4 * max(needed, MIN_WIDTH):  # what one long text left behind
            self._rows, self._buffers, self._width, self._bound_step = [], [], 0, None
        if None not in self._rows:
            self._resize(max(1, 2 * len(self._rows)), max(self._width, self._next_width(needed)))
        slot.row = self._rows.index(None)
        self._rows[slot.row] = slot

    def remove(self, slot: Slot) -> None:
        """Take a slot's row from it."""
        self._rows[slot.row] = None

    def copy_prefix(self, slot: Slot, length: int) -> list[np.ndarray]:
        """(heads, length, size) keys or values of a slot's first tokens, one for each past input."""
        parts = []
        for buffer in self._buffers:
            with buffer.edit() as array:
                parts.append(array[slot.row, :, :length].copy())
        return parts

    def load_prefix(self, slot: Slot, kv_arrays: Sequence[np.ndarray], length: int) -> None:
        """Let a slot hold `length` tokens: what it lacks of them comes from `kv_arrays`, as `copy` gives them."""
        self._ensure_width(length)
        for buffer, part in zip(self._buffers, kv_arrays, strict=True):
            with buffer.edit() as array:
                array[slot.row, :, slot.length : length] = part[:, slot.length : length]

    def copy_from_slot(self, slot: Slot, other: Slot, length: int) -> None:
        """Let a slot hold the first `length` tokens of another."""
        self._ensure_width(length)
        for buffer in self._buffers:
            with buffer.edit() as array:
                array[slot.row, :, slot.length : length] = array[other.row, :, slot.length : length]

    def prefill(self, slots: Sequence[Slot], chunks: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Give each slot several tokens: for each, (V,) float32 logits of what follows the last."""
        self._ensure_width(max(slot.length + len(piece) for slot, piece in zip(slots, chunks, strict=True)))
        piece_of = dict(zip(slots, chunks, strict=True))
        found: dict[Slot, np.ndarray] = {}
        for group in self._group_slots(piece_of):
            if len(group) > 1 and group[0].length:  # one token each, after what they have
                values = self.step(group, [piece_of[slot][0] for slot in group])
                found |= {slot: row.copy() for slot, row in zip(group, values, strict=True)}
            else:
                found |= self._prefill_group(group, [piece_of[slot] for slot in group])
        return [found[slot] for slot in slots]

    def _group_slots(self, chunks: dict[Slot, Sequence[int]]) -> list[list[Slot]]:
        """Slots that one run of the graph can take together."""
        fresh = sorted((slot for slot in chunks if not slot.length), key=lambda slot: len(chunks[slot]))
        for slot, row in zip(
            fresh, sorted(slot.row for slot in fresh), strict=True
        ):  # rows without content move freely
            slot.row, self._rows[row] = row, slot
        most = min(MAX_PREFILL_TOKENS, self._session.max_prefill_tokens)
        groups: list[list[Slot]] = []
        for slot in fresh:
            length, group = len(chunks[slot]), groups[-1] if groups else []
            beside = group and group[-1].row + 1 == slot.row and len(chunks[group[0]]) >= MIN_LENGTH_RATIO * length
            if beside and (len(group) + 1) * length <= most:
                group.append(slot)
            else:
                groups.append([slot])
        others = [slot for slot in chunks if slot.length]
        single = [slot for slot in others if len(chunks[slot]) == 1]
        alone = [[slot] for slot in others if len(chunks[slot]) > 1]
        return groups + alone + ([single] if single else [])

    def _prefill_group(self, slots: Sequence[Slot], chunks: Sequence[Sequence[int]]) -> dict[Slot, np.ndarray]:
        """One run over slots in rows side by side; several have no past, and their pieces are padded at the end."""
        session, start = self._session, slots[0].length
        lengths = np.array([len(piece) for piece in chunks])[:, None]
        new = int(lengths.max())
        tokens = np.zeros((len(slots), new), np.int64)
        for row, piece in zip(tokens, chunks, strict=True):
            row[: len(piece)] = piece
        arrays = {
            "input_ids": tokens,
            "attention_mask": (np.arange(start + new) < start + lengths).astype(np.int64),
            "position_ids": np.broadcast_to(np.arange(start, start + new), tokens.shape),
        }
        binding = session.onnx_session.io_binding()
        for name in session.input_names:
            binding.bind_cpu_input(name, np.ascontiguousarray(arrays[name]))
        binding.bind_output("logits", "cpu")
        for buffer, past, present in zip(self._buffers, session.past_inputs, session.present_names, strict=True):
            buffer.bind(binding, past, present, slots[0].row, len(slots))
        session.onnx_session.run_with_iobinding(binding)
        logits = ortvalue_to_numpy(binding.get_outputs()[0])
        return {
            slot: logits[row, len(piece) - 1].astype(np.float32)
            for row, (slot, piece) in enumerate(zip(slots, chunks, strict=True))
        }

    def step(self, slots: Sequence[Slot], tokens: Sequence[int]) -> np.ndarray:
        """Give each slot one token: (n, V) float32 logits of what follows, which the next step overwrites."""
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
        """Have these slots in rows that follow one another; gives the first. Moves no more than it must."""
        rows = [slot.row for slot in slots]
        if max(rows) - min(rows) + 1 == len(rows):
            return min(rows)
        outside = [slot for slot in slots if slot.row >= len(slots)]
        holes = sorted(set(range(len(slots))) - set(rows))
        moves = [(slot, self._rows[hole], hole) for slot, hole in zip(outside, holes, strict=True)]
        for buffer in self._buffers:
            with buffer.edit() as array:
                for slot, other, hole in moves:
                    kept = array[hole, :, : other.length].copy() if other else None
                    array[hole, :, : slot.length] = array[slot.row, :, : slot.length]
                    if other is not None:
                        array[slot.row, :, : other.length] = kept
        for slot, other, hole in moves:
            self._rows[hole], self._rows[slot.row] = slot, other
            if other:
                other.row = slot.row
            slot.row = hole
        return 0

    def _ensure_width(self, length: int) -> None:
        """Room for `length` tokens in each row."""
        if length > self._width:
            self._resize(len(self._rows), self._next_width(length))

    def _next_width(self, length: int) -> int:
        """The width for rows of `length` tokens: doubled, so that a growing row is seldom copied."""
        return max(length, min(self._session.max_length, max(MIN_WIDTH, 2 ** (length - 1).bit_length())))

    def _resize(self, rows: int, width: int) -> None:
        """New buffers of this size with what the rows hold, one after another: two of one layer at a time."""
        session = self._session
        self._buffers = self._buffers or [None] * len(session.past_inputs)  # type: ignore[list-item]
        for place, item in enumerate(session.past_inputs.values()):
            old, (_, heads, _, size) = self._buffers[place], item.shape
            new = Buffer((rows, heads, width, size), session.numpy_type(item), session.device)
            if any(slot and slot.length for slot in self._rows):
                with old.edit() as before, new.edit() as after:
                    for row, slot in enumerate(self._rows):
                        if slot:
                            after[row, :, : slot.length] = before[row, :, : slot.length]
            self._buffers[place] = new
        self._rows += [None] * (rows - len(self._rows))
        self._width, self._bound_step = width, None


class _BoundStep:
    """The inputs and outputs of one-token runs over the same rows: bound once, filled anew at each step."""

    def __init__(self, session: Session, slots: list[Slot], first: int) -> None:
        count = len(slots)
        self.slots = slots
        self.binding = session.onnx_session.io_binding()
        self._onnx_session = session.onnx_session
        order = [slot.row - first for slot in slots]
        self._order = None if order == list(range(count)) else np.array(order)  # None: the slots are in order
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
        """One step; `longest` is the longest row's length with its new token."""
        count, order = len(self.slots), self._order
        where = slice(None) if order is None else order
        self._tokens[where, 0] = tokens
        self._positions[where, 0] = [slot.length for slot in self.slots]
        if longest > len(self._range):
            self._range = np.arange(2 * longest)
            self._mask = np.empty(count * len(self._range), np.int64)
        mask = self._mask[: count * longest].reshape(count, longest)
        np.less_equal(self._range[:longest], self._positions, out=mask)
        self.binding.bind_input("attention_mask", "cpu", 0, np.int64, mask.shape, self._mask.ctypes.data)
        self._onnx_session.run_with_iobinding(self.binding)
        logits = self._logits[:, 0] if order is None else self._logits[order, 0]
        return logits.astype(np.float32, copy=False)
