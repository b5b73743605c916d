"""Write the inputs that each layer reads of the token itself, as Gemma 3n and Gemma 4 have them."""

from __future__ import annotations

from limbeck.export.graph.builder import GraphBuilder
from limbeck.export.graph.decoder import Layer, TokenInputs


def write_token_inputs(graph: GraphBuilder, inputs: TokenInputs, layers: int, x: str) -> None:
    """Compute the inputs of all layers from the embeddings x (B, S, H): tensors "token_input.LAYER", (B, S, P)."""
    size = len(inputs.norm.weight)
    table = graph.constant(f"{inputs.name}.weight", inputs.table)
    looked_up = graph.node("Gather", [table, "input_ids"], "token_inputs.embedding")
    factor = graph.number("token_inputs.scale", inputs.table_scale)
    looked_up = graph.node("Mul", [looked_up, factor], "token_inputs.scaled")
    projected = graph.linear(x, inputs.project)
    each = graph.node("Reshape", [projected, graph.ints(0, 0, -1, size)], "token_inputs.layers")
    normed = graph.node("Reshape", [graph.norm(each, inputs.norm), graph.ints(0, 0, layers * size)], "token_inputs.row")
    total = graph.node("Add", [looked_up, normed], "token_inputs")
    parts = [f"token_input.{layer}" for layer in range(layers)]
    graph.node("Split", [total, graph.ints(*[size] * layers)], *parts, axis=-1)


def write_layer_end(graph: GraphBuilder, layer: Layer, index: int, x: str) -> str:
    """Add the layer's input of the token to x (B, S, H), and scale the sum."""
    part = layer.token_input
    if part:
        gate = graph.activation(graph.linear(x, part.gate), part.activation, f"{layer.name}.token.act")
        y = graph.linear(graph.node("Mul", [gate, f"token_input.{index}"], f"{layer.name}.token.gated"), part.project)
        x = graph.node("Add", [x, graph.norm(y, part.norm)], f"{layer.name}.token.added")
    if layer.scale != 1:
        x = graph.node("Mul", [x, graph.number(f"{layer.name}.scale", layer.scale)], f"{layer.name}.scaled")
    return x
