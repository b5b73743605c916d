"""Read the parameters of a transformers model, and notice those that nobody read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from limbeck.export.graph.decoder import Linear, Norm, Rotary

LAYER_NORM_EPS = 1e-5  # torch's default; OLMo's norm has no attribute for it


class UnsupportedModel(Exception):
    """The fused graph has no place for a part of the model."""


class ModelReader:
    """Reads parameters by module and records them: a parameter that was never read is a part the reader overlooked."""

    def __init__(self, model: Any) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        saved = model.state_dict().keys()  # buffers too, unless they are computed from the configuration
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._parameters = {id(tensor): name for name, tensor in tensors if name in saved}
        self._read: set[int] = set()

    def unread_parameters(self) -> set[str]:
        """Return the names of the parameters and saved buffers that were not read."""
        return {name for key, name in self._parameters.items() if key not in self._read}

    def name(self, module: Any) -> str:
        """Return the name of a module within the model, such as "model.layers.0"."""
        return self._names[module]

    def array(self, parameter: Any) -> np.ndarray:
        """Return a parameter as float32 array that shares its memory."""
        self._read.add(id(parameter))
        return parameter.detach().numpy()

    def linear(self, module: Any, scale: float = 1.0) -> Linear:
        """Read a torch Linear or GPT-2's Conv1D, whose weight is transposed. The output is multiplied by `scale`."""
        weight = self.array(module.weight)
        if type(module).__name__ != "Conv1D":
            weight = weight.T
        bias = None if module.bias is None else self.array(module.bias)
        if scale != 1:
            weight = weight * np.float32(scale)
            bias = None if bias is None else bias * np.float32(scale)
        return Linear(self.name(module), weight, bias)

    def concatenate_linears(self, name: str, *modules: Any) -> Linear:
        """Read several products of the same input as one, with the outputs side by side."""
        return join_linears(name, *map(self.linear, modules))

    def norm(self, module: Any, size: int | None = None) -> Norm:
        """Read a layer norm or an RMS norm: which one, and whether it adds 1 to its weight, is seen by running it.

        Args:
            size: entries of what it norms, for a module that has neither weight nor shape.

        Raises UnsupportedModel if it is neither.
        """
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        shape = getattr(module, "normalized_shape", (size,)) if weight is None else tuple(weight.shape)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", LAYER_NORM_EPS))
        ones, zeros = np.ones(shape, np.float32), np.zeros(shape, np.float32)
        read = Norm(
            self.name(module),
            ones if weight is None else self.array(weight),
            zeros if bias is None else self.array(bias),
            float(np.finfo(np.float32).eps if eps is None else eps),
        )
        plus_one = replace(read, weight=read.weight + np.float32(1))
        candidates = [read, plus_one]
        if bias is None:
            candidates = [replace(norm, bias=None) for norm in candidates] + candidates
        found = next((norm for norm in candidates if _norms_like(norm, module)), None)
        if found is None:
            raise UnsupportedModel(f"{self.name(module)} is neither a layer norm nor an RMS norm")
        return found

    def head_norms(self, modules: Any) -> Norm:
        """Read one norm per head as one, whose weight and bias have a row for each head."""
        norms = [self.norm(module) for module in modules]
        biases = [norm.bias for norm in norms if norm.bias is not None]
        weight, bias = np.stack([norm.weight for norm in norms]), np.stack(biases) if biases else None
        return replace(norms[0], weight=weight, bias=bias)

    def rotary(self, module: Any, positions: int, layer_type: str | None = None, interleaved: bool = False) -> Rotary:
        """Compute the tables of a transformers rotary module for `positions` positions, with its scaling.

        Args:
            layer_type: for a module that has tables for each type of layer, as Gemma 3's has.
            interleaved: it rotates pairs of neighbours.

        Raises UnsupportedModel if there are none for that type.
        """
        import torch

        by_type = isinstance(module.rope_type, dict)
        if by_type and layer_type not in module.rope_type:
            raise UnsupportedModel(f"no rotary embedding for layers of the type {layer_type!r}")
        with torch.inference_mode():
            cos, sin = module(torch.zeros(1), torch.arange(positions)[None], *([layer_type] if by_type else []))
        # Most modules give each entry twice: side by side, or in the second half again.
        half, once = cos.shape[-1] // 2, slice(None)
        if torch.equal(cos[..., ::2], cos[..., 1::2]):
            once = slice(None, None, 2)
        elif torch.equal(cos[..., :half], cos[..., half:]):
            once = slice(half)
        name = f"{self.name(module)}.{layer_type}" if by_type else self.name(module)
        return Rotary(name, cos[0, :, once].numpy(), sin[0, :, once].numpy(), interleaved)

    def head(self, model: Any, embedding: Any) -> tuple[Linear | None, np.ndarray | None]:
        """Read the language-model head: (head, None), or (None, its bias) if it is tied to the embedding."""
        head = model.get_output_embeddings()
        if head.weight is not embedding.weight:
            return self.linear(head), None
        return None, None if head.bias is None else self.array(head.bias)


def join_linears(name: str, *parts: Linear) -> Linear:
    """Return several products of the same input as one, with the outputs side by side."""
    biases = [np.zeros(p.weight.shape[1], np.float32) if p.bias is None else p.bias for p in parts]
    bias = None if all(p.bias is None for p in parts) else np.concatenate(biases)
    return Linear(name, np.concatenate([p.weight for p in parts], axis=1), bias)


def _norms_like(norm: Norm, module: Any) -> bool:
    """Return True if `norm` computes what `module` does, on numbers so small that eps matters and of unequal mean."""
    import torch

    x = np.random.default_rng(0).normal(0.003, 0.002, (4, *norm.weight.shape)).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(x)).numpy()
    bias = np.float32(0) if norm.bias is None else norm.bias
    y = x if norm.bias is None else x - x.mean(axis=-1, keepdims=True)
    y = y / np.sqrt(np.square(y).mean(axis=-1, keepdims=True) + norm.eps) * norm.weight + bias
    tolerance = 1e-4 * (1 + np.abs(norm.weight) + np.abs(bias))
    return bool((np.abs(y - expected) <= tolerance).all())
