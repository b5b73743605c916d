"""Parts that descriptions of several families share."""

from __future__ import annotations

from typing import Any

from limbeck.export.graph.decoder import Decoder, Layer
from limbeck.export.graph.reader import ModelReader, UnsupportedModel

# transformers' names of activations -> those of limbeck.export.graph.decoder.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def activation_name(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {name!r}")
    return ACTIVATIONS[name]


def assemble_decoder(
    reader: ModelReader, model: Any, embedding: Any, layers: list[Layer], norm: Any, **positions: Any
) -> Decoder:
    """Put a decoder together from its layers, embedding, last norm and head."""
    head, head_bias = reader.head(model, embedding)
    table = reader.array(embedding.weight)
    return Decoder(reader.name(embedding), table, layers, reader.norm(norm), head, head_bias=head_bias, **positions)
