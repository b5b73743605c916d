"""A tiny transformers model beside its fused graph, to compare the two."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from limbeck.export.runtime.session import empty_past_shape

CACHE_LENGTH = 40  # positions of the static cache


class FusedModel(NamedTuple):
    """A transformers model and its fused graph."""

    torch: Any
    session: ort.InferenceSession

    def reference(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(B, T, V) logits of transformers."""
        import torch

        tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if "position_ids" in inspect.signature(self.torch.forward).parameters:
            tensors["position_ids"] = torch.from_numpy(positions(mask))
        with torch.inference_mode():
            return self.torch(**tensors).logits.numpy()

    def run(
        self, ids: np.ndarray, mask: np.ndarray, position_ids: np.ndarray, past: list[np.ndarray] | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Run with a dynamic cache. Returns (B, S, V) logits and the cache after them."""
        inputs = self.session.get_inputs()
        past = past or [np.zeros(empty_past_shape(item, len(ids)), np.float32) for item in inputs[3:]]
        feed = [ids, mask, position_ids, *past]
        logits, *present = self.session.run(None, {item.name: x for item, x in zip(inputs, feed, strict=True)})
        return logits, present

    def run_with_static_cache(
        self, ids: np.ndarray, mask: np.ndarray, position_ids: np.ndarray, buffers: list[np.ndarray]
    ) -> np.ndarray:
        """Return (B, S, V) logits. Writes new keys and values to the buffers, (B, heads, CACHE_LENGTH, size)."""
        names = [item.name for item in self.session.get_inputs()]
        binding = self.session.io_binding()
        for name, x in zip(names, [ids, mask, position_ids], strict=False):
            binding.bind_cpu_input(name, np.ascontiguousarray(x))
        binding.bind_output("logits", "cpu")
        for name, x in zip(names[3:], buffers, strict=True):
            buffer = ("cpu", 0, np.float32, x.shape, x.ctypes.data)
            binding.bind_input(name, *buffer)
            binding.bind_output(name.replace("past_key_values", "present"), *buffer)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    def buffers(self, rows: int) -> list[np.ndarray]:
        """Make a static cache for `rows` rows, filled with NaN: positions that were not written must not be read."""
        inputs = self.session.get_inputs()[3:]
        return [np.full((rows, x.shape[1], CACHE_LENGTH, x.shape[3]), np.nan, np.float32) for x in inputs]


def positions(mask: np.ndarray) -> np.ndarray:
    """Return the position of each token, counted over the ones of the mask (B, T)."""
    return np.maximum(mask.cumsum(axis=1) - 1, 0)


def make_torch_model(model_type: str, config: dict[str, Any], noise: float = 0.2, **options: Any) -> Any:
    """Make a random model with eager attention, in which no two parameters are equal, zero or small.

    Args:
        noise: standard deviation of the matrices' entries.
        **options: others of the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), 0) | {"pad_token_id": None}
    made = AutoConfig.for_model(model_type, **copy.deepcopy(ids | config | options))  # it writes into dictionaries
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # some parameters start at random numbers, and `randomize` adds to them
        model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    randomize(model, noise)
    return model


def randomize(model: Any, noise: float) -> None:
    """Draw all parameters and saved buffers anew: equal norms or biases would hide errors in how they are used."""
    import torch

    generator, saved = torch.Generator().manual_seed(1), model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    with torch.no_grad():
        for tensor in [*model.parameters(), *buffers]:
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn * noise if tensor.ndim >= 2 else tensor + 0.2 * drawn)


def make_fused_model(torch_model: Any, folder: Path) -> FusedModel:
    """Write the fused graph of `torch_model` into `folder`, and load it. Raises UnsupportedModel if it has none."""
    from limbeck.export.graph.families.table import decoder_from_model
    from limbeck.export.graph.write import write_graph

    path = folder / "model.onnx"
    write_graph(decoder_from_model(torch_model), path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return FusedModel(torch_model, ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


def largest_difference(model: FusedModel, length: int = 80) -> float:
    """Compare random texts of `length` tokens. Returns the largest difference in log-probability, in nats.

    Two texts run whole and padded on the left, and one in chunks with the cache.
    """
    from limbeck.export.runtime.sampling import log_softmax

    ids = np.random.default_rng(0).integers(3, model.torch.get_input_embeddings().num_embeddings, (2, length))
    whole, left, padding = np.ones_like(ids), np.ones_like(ids), length // 3
    left[1, :padding] = 0
    expected = log_softmax(model.reference(ids, whole).astype(np.float64))
    alone = log_softmax(model.reference(ids[1:, padding:], whole[1:, padding:]).astype(np.float64))
    pairs = [(model.run(ids, whole, positions(whole))[0], expected)]
    padded = model.run(ids, left, positions(left))[0]
    pairs += [(padded[0], expected[0]), (padded[1, padding:], alone[0])]
    past, start = None, 0
    for end in (length // 2 - 7, length // 2 - 6, length - 20, length):
        logits, past = model.run(ids[:1, start:end], whole[:1, :end], positions(whole)[:1, start:end], past)
        pairs.append((logits[0], expected[0, start:end]))
        start = end
    return max(float(np.abs(log_softmax(ours.astype(np.float64)) - theirs).max()) for ours, theirs in pairs)
