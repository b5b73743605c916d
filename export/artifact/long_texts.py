"""Compare a graph with PyTorch past the lengths at which a model changes its numbers, such as the end of a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.export.runtime.batch import Batch
from limbeck.export.runtime.runtime import Runtime

# A longer text takes minutes, and memory for its keys and values, in PyTorch as in onnxruntime.
MAX_TOKENS = 16_384 + 64
AFTER = 24  # tokens read past a length; those around it and the last ones are compared
AROUND = 8
STEPS = 8  # tokens that the runtime reads one by one, across the longest length
CHUNK = 256  # tokens of one forward pass of PyTorch
# Their tables depend on the length of the whole text, so PyTorch must read it in one pass.
LENGTH_DEPENDENT_ROTARY = {"dynamic", "longrope"}


def change_lengths(config: Any) -> list[int]:
    """List the lengths at which a model with this transformers config changes its numbers, ascending.

    These are attention windows and chunks, and the `original_max_position_embeddings` of rotary scaling and of query
    scaling.
    """
    text = config.get_text_config()
    layer_types = getattr(text, "layer_types", None) or ["sliding_attention"]
    lengths = set()
    if any("sliding" in layer_type for layer_type in layer_types):
        lengths.add(getattr(text, "sliding_window", None))
    if any("chunked" in layer_type for layer_type in layer_types):
        lengths.add(getattr(text, "attention_chunk_size", None))
    lengths |= {group.get("original_max_position_embeddings") for group in _rotary_groups(text)}
    lengths.add(getattr(text, "original_max_position_embeddings", None))
    return sorted(int(length) for length in lengths if length)


def compared_lengths(config: Any, max_length: int) -> tuple[list[int], list[int]]:
    """Split `change_lengths`: those that parity compares past, and those that it does not reach.

    Args:
        max_length: the context of the runtime; a length at or above it changes nothing that the runtime can compute.
    """
    lengths = [length for length in change_lengths(config) if length + 1 < max_length]
    return [n for n in lengths if n + AFTER <= MAX_TOKENS], [n for n in lengths if n + AFTER > MAX_TOKENS]


@dataclass(frozen=True)
class LongText:
    """A text past a length, in the runtime.

    Attributes:
        row: its token ids.
        places: the tokens after which logits are compared.
        logits: (n, V) after them, read in chunks with the cache.
        stepped_places, stepped: some of them again, read one by one; (m, V).
    """

    row: list[int]
    places: list[int]
    logits: np.ndarray
    stepped_places: list[int]
    stepped: np.ndarray | None


def run_long_text(runtime: Runtime, tokens: Sequence[int], lengths: Sequence[int]) -> LongText:
    """Run a text past the longest of `lengths`: in chunks with the cache, and its last tokens one by one.

    Args:
        tokens: repeated until they are long enough.
        lengths: ascending, at least one.
    """
    size = min(lengths[-1] + AFTER, runtime.max_length)
    row = [tokens[index % len(tokens)] for index in range(size)]
    places = sorted({place for n in lengths for place in range(n - AROUND, min(n + AROUND, size))} | {size - 1})
    places = [place for place in places if place >= 0]
    logits = _pick(runtime.prompt_logits(row), places)
    first = min(lengths[-1] - STEPS // 2, size - STEPS)
    steps = [place for place in places if first <= place < min(first + STEPS, size)] if first >= 1 else []
    if not steps:
        return LongText(row, places, logits, [], None)
    stepped = np.stack([values for place, values in _step_logits(runtime, row, first) if place in steps])
    return LongText(row, places, logits, steps, stepped)


def compare_long_text(model: Any, text: LongText) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run the text in PyTorch. Yields logits of PyTorch and of the runtime, (n, V) each."""
    expected = _torch_logits(model, text.row, text.places)
    yield expected, text.logits
    if text.stepped is not None:
        yield expected[[text.places.index(place) for place in text.stepped_places]], text.stepped


def _step_logits(runtime: Runtime, row: list[int], first: int) -> Iterator[tuple[int, np.ndarray]]:
    """Read `first` tokens as a prompt, STEPS more one by one. Yields (place, (V,) logits after that token)."""
    batch = Batch(runtime, prefix_cache_tokens=0)
    slot = batch.add_prompt(row[:first])
    while batch.prefill([slot], runtime.max_prefill_tokens)[0] is None:
        pass
    for place in range(first, min(first + STEPS, len(row))):
        yield place, batch.step([slot], [row[place]])[0].copy()
    batch.remove_slot(slot)


def _torch_logits(model: Any, row: list[int], places: list[int]) -> np.ndarray:
    """(n, V) float32 logits of `model` after the tokens at `places`."""
    import torch

    groups = _rotary_groups(model.config.get_text_config())
    one_pass = any(group.get("rope_type") in LENGTH_DEPENDENT_ROTARY for group in groups)
    chunk, ids = len(row) if one_pass else CHUNK, torch.tensor([row])

    def chunks() -> Iterator[np.ndarray]:
        cache = None
        for start in range(0, len(row), chunk):
            out = model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            yield out.logits[0].numpy()

    with torch.inference_mode():
        return _pick(chunks(), places)


def _pick(chunks: Iterator[np.ndarray], places: list[int]) -> np.ndarray:
    """The rows at `places` of arrays (t, V) that follow each other."""
    picked, start = [], 0
    for chunk in chunks:
        picked += [chunk[place - start].copy() for place in places if start <= place < start + len(chunk)]
        start += len(chunk)
    return np.stack(picked)


def _rotary_groups(text_config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of a config: one group, or one for each layer type."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [group for group in parameters.values() if isinstance(group, dict)]
    return nested or [parameters]
