"""Read the parameters of a transformers model, and notice those that nobody read."""

from __future__ import annotations

from typing import Any

import numpy as np

from limbeck.export.graph.decoder import Linear, Norm, Rotary

# Rotary embeddings whose tables depend on the length of the text; a graph holds one table.
DYNAMIC_ROTARY = {"dynamic", "longrope"}


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
        parts = [self.linear(module) for module in modules]
        biases = [np.zeros(p.weight.shape[1], np.float32) if p.bias is None else p.bias for p in parts]
        bias = None if all(p.bias is None for p in parts) else np.concatenate(biases)
        return Linear(name, np.concatenate([p.weight for p in parts], axis=1), bias)

    def norm(self, module: Any, weight_offset: float = 0.0) -> Norm:
        """Read a layer norm or an RMS norm. Gemma's RMS norms multiply by 1 + weight: `weight_offset` is the 1."""
        if hasattr(module, "normalized_shape"):
            return self.layer_norm(module)
        eps = getattr(module, "variance_epsilon", None) or module.eps
        weight = self.array(module.weight)
        if weight_offset:
            weight = weight + np.float32(weight_offset)
        return Norm(self.name(module), weight, None, float(eps))

    def layer_norm(self, module: Any) -> Norm:
        """Read a torch LayerNorm; a missing weight is 1, a missing bias 0."""
        size = module.normalized_shape[0]
        weight = np.ones(size, np.float32) if module.weight is None else self.array(module.weight)
        bias = np.zeros(size, np.float32) if module.bias is None else self.array(module.bias)
        return Norm(self.name(module), weight, bias, float(module.eps))

    def rotary(self, module: Any, positions: int, layer_type: str | None = None) -> Rotary:
        """Compute the tables of a transformers rotary module for `positions` positions, with its scaling.

        Args:
            layer_type: for a module that has tables for each type of layer, as Gemma 3's has.

        Raises UnsupportedModel if they depend on the length of the text.
        """
        import torch

        by_type = isinstance(module.rope_type, dict)
        rope_type = module.rope_type[layer_type] if by_type else module.rope_type
        if rope_type in DYNAMIC_ROTARY:
            raise UnsupportedModel(f"rotary embedding of type {rope_type!r}")
        with torch.inference_mode():
            cos, sin = module(torch.zeros(1), torch.arange(positions)[None], *([layer_type] if by_type else []))
        half = cos.shape[-1] // 2  # the second half repeats the first
        name = f"{self.name(module)}.{layer_type}" if by_type else self.name(module)
        return Rotary(name, cos[0, :, :half].numpy(), sin[0, :, :half].numpy())

    def head(self, model: Any, embedding: Any) -> tuple[Linear | None, np.ndarray | None]:
        """Read the language-model head: (head, None), or (None, its bias) if it is tied to the embedding."""
        head = model.get_output_embeddings()
        if head.weight is not embedding.weight:
            return self.linear(head), None
        return None, None if head.bias is None else self.array(head.bias)
