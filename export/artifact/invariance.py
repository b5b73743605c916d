"""Compare an artifact with itself: a text alone, and the same text in a batch, padded on the left, and with a cache."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from limbeck.export.artifact.totals import Totals
from limbeck.export.runtime.batch import Batch
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.session import NUMPY_TYPES, empty_past_shape, positions_from_mask

ROWS, ROW_TOKENS = 4, 64  # texts that are compared, and at most so many tokens of each
CACHE_STEPS = 8  # last tokens of a left-padded batch, run one by one with the cache


def measure_invariance(runtime: Runtime, rows: list[list[int]]) -> dict[str, float]:
    """Measure how far texts alone are from the same texts in batches and with caches. Returns fields of `Parity`.

    Args:
        rows: token ids; beginnings of the first ones are used, of unequal length.
    """
    rows = _rows_of_unequal_length(rows)
    alone = [runtime.logits(*pad([row]))[0] for row in rows]
    fields: dict[str, float] = {}
    for name, results in (
        ("batch", _run_together(runtime, rows)),
        ("left_padding", _run_left_padded(runtime, rows)),
        ("cache", _run_token_by_token(runtime, rows)),
    ):
        totals = Totals()
        for row, start, logits in results:
            totals.compare_logits(alone[row][start : start + len(logits)], logits)
        fields |= {f"{name}_diff": totals.max_diff, f"{name}_kl": float(np.mean(totals.kl))}
    return fields


def _rows_of_unequal_length(rows: list[list[int]]) -> list[list[int]]:
    """Return beginnings of the first rows, of unequal length."""
    return [
        row[: max(2, len(row) * (ROWS - step) // ROWS)]
        for step, row in enumerate(row[:ROW_TOKENS] for row in rows[:ROWS])
    ]


def pad(rows: list[list[int]], left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and mask, each (B, T) int64."""
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return ids, mask


def _run_together(runtime: Runtime, rows: list[list[int]]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Run rows padded on the right. Yields (row, 0, (T, V) logits)."""
    logits = runtime.logits(*pad(rows))
    for row, ids in enumerate(rows):
        yield row, 0, logits[row, : len(ids)]


def _run_left_padded(runtime: Runtime, rows: list[list[int]]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Run rows padded on the left, the last tokens one by one. Yields (row, token, (1, V) logits after that token).

    Uses the bare graph as other runtimes do: the cache outputs of a run are the inputs of the next one.
    """
    session = runtime.onnx_session
    tokens, mask = pad(rows, left=True)
    place = positions_from_mask(mask)
    width = tokens.shape[1]
    inputs = session.get_inputs()
    cache = [item for item in inputs if item.name.startswith("past_key_values.")]
    past = [np.zeros(empty_past_shape(item, len(rows)), NUMPY_TYPES[item.type]) for item in cache]
    outputs = ["logits", *(item.name.replace("past_key_values.", "present.", 1) for item in cache)]
    first = width - min(CACHE_STEPS, min(map(len, rows)) - 1)
    for start, end in pairwise([0, *range(first, width + 1)]):
        feeds = {
            "input_ids": tokens[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": place[:, start:end],
            **{item.name: value for item, value in zip(cache, past, strict=True)},
        }
        logits, *past = session.run(outputs, {item.name: feeds[item.name] for item in inputs})
        for row in range(len(rows)):
            for column in range(start, end):
                if mask[row, column]:
                    yield row, int(place[row, column]), logits[row, column - start, None]


def _run_token_by_token(runtime: Runtime, rows: list[list[int]]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Run the first half of each row as a prompt, the rest as a batch, token by token, with the runtime's cache.

    Yields (row, token, (1, V) logits after that token).
    """
    batch = Batch(runtime)
    halves = [len(row) // 2 for row in rows]
    slots = [batch.add_prompt(row[:half]) for row, half in zip(rows, halves, strict=True)]
    for row, slot in enumerate(slots):
        logits = None
        while logits is None:
            [logits] = batch.prefill([slot], len(rows[row]))
        yield row, halves[row] - 1, logits[None]
    for step in range(max(len(row) - half for row, half in zip(rows, halves, strict=True))):
        unfinished = [row for row, ids in enumerate(rows) if halves[row] + step < len(ids)]
        tokens = [rows[row][halves[row] + step] for row in unfinished]
        results = batch.step([slots[row] for row in unfinished], tokens)
        for row, logits in zip(unfinished, results, strict=True):
            yield row, halves[row] + step, logits[None].copy()
    for slot in slots:
        batch.remove_slot(slot)
