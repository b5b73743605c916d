"""Runs batches of rows through an exported ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from limbeck.evals.engines.batches import Batch, TokenCounter
from limbeck.evals.engines.onnx_graph import LOGIT_POSITIONS, TREE_MASK, open_session
from limbeck.evals.engines.probe import HALF_PRECISION_TOLERANCE, TOLERANCE, SharingProbe
from limbeck.evals.engines.torch_batches import additive_mask, target_logprobs
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.session import NUMPY_TYPES, empty_past_shape, grows


class OnnxForward:
    """The `batches.Forward` of an ONNX graph with key-value cache, changed to allow shared prefixes.

    With activations rounded to int8 the last bit of a sum may change a number. Whether prefixes may
    be shared is then tested with the same weights and activations in float32.
    """

    def __init__(self, folder: Path, max_length: int, float_products: bool = False) -> None:
        try:
            self.session, quantizes = open_session(folder, float_products)
        except Exception:  # onnx and onnxruntime errors have no common base class
            Runtime.load(folder, verify=False)  # raises an error that says what is wrong with the artifact
            raise
        self.max_length = max_length
        self.work = TokenCounter()
        self._inputs = {item.name: item for item in self.session.get_inputs()}
        self._past = [item for name, item in self._inputs.items() if name.startswith("past_key_values.")]
        self._present = [item.name.replace("past_key_values.", "present.", 1) for item in self._past]
        # A fused graph's attention kernel accepts several tokens after a past for one row at a time only.
        self._one_row_at_a_time = self.session.get_modelmeta().custom_metadata_map.get("limbeck.graph") == "fused"
        self.vocab_size = int(self.session.get_outputs()[0].shape[-1])
        in_half = any(NUMPY_TYPES[item.type] == np.float16 for item in self._past)
        self._probe = SharingProbe(
            lambda: OnnxForward(folder, max_length, float_products=True) if quantizes else self,
            HALF_PRECISION_TOLERANCE if in_half else TOLERANCE,
        )

    def max_shared_tokens(self, tokens: int) -> int:
        """See `batches.Forward.max_shared_tokens`."""
        if TREE_MASK not in self._inputs or "position_ids" not in self._inputs or not all(map(grows, self._past)):
            return 0
        return self._probe.max_shared_tokens(tokens)

    def run(self, batch: Batch, trunk: Any = None, keep_trunk: bool = False) -> tuple[np.ndarray, np.ndarray, Any]:
        """See `batches.Forward.run`. A trunk is the graph's past: arrays of shape (1, heads, tokens, width)."""
        import torch

        parts = [batch] if trunk is None or not self._one_row_at_a_time else _split_rows(batch)
        results = [self._logits(part, trunk, keep_trunk) for part in parts]
        logits = np.concatenate([logits for logits, _ in results]) if len(results) > 1 else results[0][0]
        rows, targets = torch.from_numpy(batch.logit_rows), torch.from_numpy(batch.target_tokens)
        logprobs, likeliest = target_logprobs(torch.from_numpy(logits), rows, targets)
        return logprobs.numpy(), likeliest.numpy(), results[0][1] if keep_trunk else None

    def _logits(self, batch: Batch, trunk: Any, keep_trunk: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        """(M, V) logits at `batch.logit_positions`, and the trunk; empty without `keep_trunk`."""
        count, width = batch.tokens.shape
        real = np.arange(batch.start + width) < batch.start + batch.lengths[:, None]
        depth = batch.depth
        if depth is None:  # padding repeats the last position: the context may end there
            depth = batch.start + np.minimum(np.arange(width), batch.lengths[:, None] - 1)
        feeds = {
            "input_ids": batch.tokens,
            "attention_mask": real.astype(np.int64),
            "position_ids": depth,
            TREE_MASK: np.zeros((1, 1, 1, 1), np.float32) if batch.mask is None else additive_mask(batch).numpy(),
            LOGIT_POSITIONS: batch.logit_positions,
        }
        binding = self.session.io_binding()
        for name, value in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for index, item in enumerate(self._past):
            past = np.zeros(empty_past_shape(item, 1), NUMPY_TYPES[item.type]) if trunk is None else trunk[index]
            repeated = np.ascontiguousarray(np.broadcast_to(past, (count, *past.shape[1:])))
            binding.bind_ortvalue_input(item.name, ort.OrtValue.ortvalue_from_numpy(repeated))
        for name in ["logits", *self._present] if keep_trunk else ["logits"]:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        logits, *kept = (value.numpy() for value in binding.get_outputs())
        if LOGIT_POSITIONS not in self._inputs:
            logits = logits.reshape(count * width, -1)[batch.logit_positions]
        return logits.reshape(len(batch.logit_positions), -1), kept


def _split_rows(batch: Batch) -> Iterator[Batch]:
    """Each row of a batch in which something is predicted, as a batch of its own without padding."""
    width = batch.tokens.shape[1]
    for row, length in enumerate(batch.lengths.tolist()):
        positions = batch.logit_positions[batch.logit_positions // width == row] - row * width
        if len(positions):
            yield Batch(
                tokens=batch.tokens[row : row + 1, :length],
                lengths=batch.lengths[row : row + 1],
                start=batch.start,
                depth=None if batch.depth is None else batch.depth[row : row + 1, :length],
                mask=None if batch.mask is None else batch.mask[row : row + 1, :length, :length],
                logit_positions=positions,
                logit_rows=np.empty(0, np.int64),
                target_tokens=np.empty(0, np.int64),
            )
