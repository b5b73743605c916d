"""Embeddings of texts: the hidden states before the last projection, averaged or of the last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from limbeck.export.runtime.buffers import ortvalue_to_numpy
from limbeck.export.runtime.hidden_states import HIDDEN_STATES

if TYPE_CHECKING:
    from limbeck.export.runtime.session import Session

Pooling = Literal["mean", "last"]


def embed(session: Session, prompt: Sequence[int], pooling: Pooling) -> Iterator[np.ndarray | None]:
    """Compute the embedding of a text in chunks: yield None after each but the last, then (H,) float32 of length 1.

    Args:
        session: loaded with `hidden_states`.
        prompt: token ids, at least one.
        pooling: "mean" of all tokens, or "last" token.
    """
    cache, total = session.empty_cache(1), np.zeros(1)
    size = session.max_prefill_tokens
    for start in range(0, len(prompt), size):
        chunk = np.array([prompt[start : start + size]], np.int64)
        end = start + chunk.shape[1]
        arrays = {
            "input_ids": chunk,
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None],
        }
        binding = session.onnx_session.io_binding()
        for name in session.input_names:
            binding.bind_cpu_input(name, arrays[name])
        for name, value in zip(session.past_inputs, cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(HIDDEN_STATES, "cpu")
        for name in session.present_names:
            binding.bind_output(name, session.device)
        session.onnx_session.run_with_iobinding(binding)
        hidden, *cache = binding.get_outputs()
        states = ortvalue_to_numpy(hidden)[0].astype(np.float64)
        total = total + states.sum(axis=0) if pooling == "mean" else states[-1]
        yield None if end < len(prompt) else (total / max(np.linalg.norm(total), 1e-12)).astype(np.float32)
