"""Parts that descriptions of several families share."""

from __future__ import annotations

from typing import Any

import numpy as np

from limbeck.export.graph.decoder import Decoder, Layer, Linear
from limbeck.export.graph.reader import ModelReader, UnsupportedModel


def first_part(owner: Any, *names: str) -> Any:
    """Return the first of these attributes that `owner` has, or None. torch's Identity counts as none."""
    parts = (getattr(owner, name, None) for name in names)
    return next((part for part in parts if part is not None and type(part).__name__ != "Identity"), None)


def read_activation(module: Any) -> str:
    """Return what an activation module or function computes, in the words of limbeck.export.graph.builder.

    It is seen by running it. Raises UnsupportedModel if it is none of them.
    """
    import torch
    from torch.nn.functional import gelu, relu, silu

    x = torch.linspace(-6, 6, 97)
    known = {
        "silu": silu(x),
        "gelu": gelu(x),
        "gelu_tanh": gelu(x, approximate="tanh"),
        "quick_gelu": x * torch.sigmoid(1.702 * x),
        "relu": relu(x),
        "relu2": relu(x) ** 2,
    }
    with torch.inference_mode():
        computed = module(x)
    found = next((name for name, expected in known.items() if torch.allclose(computed, expected, atol=1e-5)), None)
    if found is None:
        raise UnsupportedModel(f"the activation {getattr(module, '__name__', type(module).__name__)}")
    return found


def mlp_activation(mlp: Any) -> str:
    """Return the activation of an MLP."""
    return read_activation(first_part(mlp, "act_fn", "activation_fn", "activation", "act"))


def rotary_positions(config: Any) -> tuple[int, int | None]:
    """Return how many positions the rotary tables need, and the limit to set for texts; None: the model's own.

    Phi-3's longrope has other tables for texts above `original_max_position_embeddings`: a text that grows beyond it
    would need all its keys computed anew. The graph is for texts up to it. With the type "dynamic", tables change
    only above `max_position_embeddings`.
    """
    positions, parameters = config.max_position_embeddings, getattr(config, "rope_parameters", None) or {}
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    originals = [group["original_max_position_embeddings"] for group in groups if group.get("rope_type") == "longrope"]
    limit = min((original for original in originals if original < positions), default=None)
    return limit or positions, limit


def reorder_columns(linear: Linear, order: np.ndarray) -> Linear:
    """Return the product with its outputs in another order: `order` has the index of each, of any shape."""
    columns = order.ravel()
    return Linear(linear.name, linear.weight[:, columns], None if linear.bias is None else linear.bias[columns])


def reorder_qkv(linear: Linear, heads: int, size: int) -> Linear:
    """Reorder the outputs (query, key, value of head 0, then of head 1, ...) to all queries, keys, values."""
    return reorder_columns(linear, np.arange(3 * heads * size).reshape(heads, 3, size).transpose(1, 0, 2))


def assemble_decoder(
    reader: ModelReader, model: Any, embedding: Any, layers: list[Layer], norm: Any, **fields: Any
) -> Decoder:
    """Put a decoder together from its layers, embedding, last norm and head. `fields` are others of Decoder."""
    head, head_bias = reader.head(model, embedding)
    return Decoder(
        reader.name(embedding),
        reader.array(embedding.weight),
        layers,
        reader.norm(norm),
        head,
        embedding_scale=float(getattr(embedding, "embed_scale", 1.0)),
        head_bias=head_bias,
        **fields,
    )
