"""Write layers that keep a recurrent state in place of keys and values: short convolutions, and gated delta rules.

The state is a past input and a present output like keys and values, but does not grow. Padding, on either side, leaves
it as it is. In place, past and present are one buffer: what reads the past must run before what writes the present.
"""

from __future__ import annotations

import numpy as np

from limbeck.export.graph.builder import GraphBuilder
from limbeck.export.graph.decoder import Convolution, GatedDelta, Norm, ShortConvolution

L2_EPS = 1e-6  # of the norm of queries and keys


def write_padding(graph: GraphBuilder) -> None:
    """Find the padding of the new tokens: "tokens.real" (B, S, 1) float32, and "tokens.end" (B, 1), one past the last.

    A single new token is never padding: in a step, rows of several lengths stand side by side.
    """
    from onnx import TensorProto

    length = graph.node("Shape", ["input_ids"], "tokens.length", start=1, end=2)
    start = graph.node("Neg", [length], "tokens.start")
    mask = graph.node("Slice", ["attention_mask", start, graph.ints(2**31), graph.ints(1)], "tokens.mask")
    visible = graph.node("Cast", [mask], "tokens.visible", to=TensorProto.BOOL)
    single = graph.node("Equal", [length, graph.ints(1)], "tokens.single")
    real = graph.node("Or", [visible, single], "tokens.are_real")
    number = graph.node("Cast", [real], "tokens.number", to=TensorProto.FLOAT)
    graph.node("Unsqueeze", [number, graph.ints(-1)], "tokens.real")
    integer = graph.node("Cast", [real], "tokens.integer", to=TensorProto.INT32)
    last = graph.node("ArgMax", [integer], "tokens.last", axis=1, keepdims=1, select_last_index=1)
    graph.node("Add", [last, graph.ints(1)], "tokens.end")


def write_short_convolution(graph: GraphBuilder, mixer: ShortConvolution, name: str, index: int, x: str) -> str:
    """Write LFM2's short convolution over x (B, S, H). Returns its output, (B, S, H)."""
    size = len(mixer.convolution.weight)
    parts = [f"{name}.conv.before", f"{name}.conv.after", f"{name}.conv.input"]
    graph.node("Split", [graph.linear(x, mixer.input), graph.ints(size, size, size)], *parts, axis=-1)
    before, after, value = parts
    gated = graph.node("Mul", [before, value], f"{name}.conv.gated")
    y = _convolve(graph, mixer.convolution, name, index, gated, "none")
    return graph.linear(graph.node("Mul", [after, y], f"{name}.conv.weighed"), mixer.output)


def write_gated_delta(graph: GraphBuilder, mixer: GatedDelta, name: str, index: int, x: str) -> str:
    """Write a gated delta rule over x (B, S, H). Returns its output, (B, S, H)."""
    keys, values = mixer.key_heads * mixer.key_size, mixer.value_heads * mixer.value_size
    parts = [f"{name}.delta.{part}" for part in ("qkv", "gate", "beta", "decay")]
    sizes = graph.ints(2 * keys + values, values, mixer.value_heads, mixer.value_heads)
    graph.node("Split", [graph.linear(x, mixer.input), sizes], *parts, axis=-1)
    qkv = _convolve(graph, mixer.convolution, name, index, parts[0], "silu")
    heads = [f"{name}.delta.{part}" for part in ("query", "key", "value")]
    graph.node("Split", [qkv, graph.ints(keys, keys, values)], *heads, axis=-1)
    for place, size in enumerate((mixer.key_size, mixer.key_size, mixer.value_size)):
        heads[place] = graph.node("Reshape", [heads[place], graph.ints(0, 0, -1, size)], f"{heads[place]}.heads")
    # x / sqrt(sum(x^2) + eps) is an RMS norm with another eps and weight.
    weight = np.full(mixer.key_size, mixer.key_size**-0.5, np.float32)
    for place in (0, 1):
        heads[place] = graph.norm(heads[place], Norm(heads[place], weight, None, L2_EPS / mixer.key_size))
    out, state = f"{name}.delta.out", f"present.{index}.recurrent"
    graph.node(
        "GatedDeltaNet",
        [*heads, "", *_decay_and_beta(graph, mixer, name, *parts[:1:-1]), f"past_key_values.{index}.recurrent"],
        out,
        state,
        domain="com.microsoft",
    )
    normed = graph.norm(out, mixer.norm)
    flat = graph.node("Reshape", [normed, graph.ints(0, 0, values)], f"{name}.delta.flat")
    gate = graph.activation(parts[1], "silu", f"{name}.delta.gate.act")
    return graph.linear(graph.node("Mul", [flat, gate], f"{name}.delta.gated"), mixer.output)


def _decay_and_beta(graph: GraphBuilder, mixer: GatedDelta, name: str, decay: str, beta: str) -> list[str]:
    """Compute the logarithm of the decay and the rate of the update, (B, S, heads) each; padding has 0 and 0."""
    shifted = graph.node("Add", [decay, graph.constant(f"{name}.decay_bias", mixer.decay_bias)], f"{decay}.shifted")
    soft = graph.node("Softplus", [shifted], f"{decay}.softplus")
    scaled = graph.node("Mul", [soft, graph.constant(f"{name}.decay_scale", mixer.decay_scale)], f"{decay}.scaled")
    rate = graph.node("Sigmoid", [beta], f"{beta}.rate")
    return [graph.node("Mul", [value, "tokens.real"], f"{value}.real") for value in (scaled, rate)]


def _convolve(graph: GraphBuilder, convolution: Convolution, name: str, index: int, x: str, activation: str) -> str:
    """Convolve each channel of x (B, S, C) with its last tokens, those before x included. Returns (B, S, C)."""
    channels, width = convolution.weight.shape
    real = graph.node("Mul", [x, "tokens.real"], f"{name}.conv.real")
    # All else reads the joined tokens, not the past: the present may be written over it.
    joined = graph.node("Concat", [f"past_key_values.{index}.conv", real], f"{name}.conv.joined", axis=1)
    kept = graph.node("Add", ["tokens.end", graph.ints(*range(width - 1))], f"{name}.conv.kept")
    places = graph.node("Unsqueeze", [kept, graph.ints(-1)], f"{name}.conv.places")
    graph.node("GatherND", [joined, places], f"present.{index}.conv", batch_dims=1)
    inputs = [joined, graph.constant(f"{convolution.name}.weight", convolution.weight.reshape(channels, 1, width))]
    if convolution.bias is not None:
        inputs.append(graph.constant(f"{convolution.name}.bias", convolution.bias))
    out = f"{name}.conv.all"
    graph.node(
        "CausalConvWithState",
        inputs,
        out,
        f"{name}.conv.state",
        domain="com.microsoft",
        channels_last=1,
        activation=activation,
    )
    return graph.node("Slice", [out, graph.ints(width - 1), graph.ints(2**31), graph.ints(1)], f"{name}.conv.new")
