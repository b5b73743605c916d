"""Write a decoder-only transformer as an ONNX graph of onnxruntime's fused operators.

A residual sum and the norm after it are one operator. Tensor names and shapes are those of optimum's graph, so that
programs read both.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.export.graph.blocks import COLUMNS, rotates_by_columns, write_attention, write_mlp
from limbeck.export.graph.builder import GraphBuilder, SideBySide
from limbeck.export.graph.decoder import Attention, Decoder, Experts, GatedDelta, Layer, ShortConvolution
from limbeck.export.graph.experts import write_experts
from limbeck.export.graph.recurrent import write_gated_delta, write_padding, write_short_convolution
from limbeck.export.graph.save import save_graph
from limbeck.export.graph.token_inputs import write_layer_end, write_token_inputs

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 21, 10
# Added to the scores of masked positions: exp() of it is 0, float16 can hold it, and a row of it gives no NaN.
MASKED_SCORE = -30000.0
HIDDEN_STATES = "last_hidden_state"  # (B, T, H), what the last projection reads; the runtime makes embeddings of it


def write_graph(decoder: Decoder, path: Path) -> None:
    """Write the graph to `path`, and weights of more than 16 MB to `<path>_data`.

    The same decoder gives the same bytes.
    """
    model, weights = _graph_of_decoder(decoder)
    save_graph(model, path, weights)


def _graph_of_decoder(decoder: Decoder) -> tuple[onnx.ModelProto, dict[str, np.ndarray | SideBySide]]:
    """Return the graph without its initializers, and these."""
    from onnx import helper

    graph = GraphBuilder()
    _mask(graph, decoder)
    if any(isinstance(layer.attention, Attention) and rotates_by_columns(layer.attention) for layer in decoder.layers):
        _columns(graph)
    if any(not isinstance(layer.attention, Attention) for layer in decoder.layers):
        write_padding(graph)
    hidden = _layers(graph, decoder, _embed(graph, decoder))
    _logits(graph, decoder, hidden)
    _rename(graph, hidden, HIDDEN_STATES)
    inputs, outputs = _signature(decoder)
    proto = helper.make_graph(graph.nodes, "decoder", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(proto, producer_name="limbeck", opset_imports=opsets, ir_version=IR_VERSION)
    logits = "all" if _needs_positions(decoder) else "position_ids"
    helper.set_model_props(model, {"limbeck.graph": "fused", "limbeck.logits": logits})
    return model, graph.initializers


def _needs_positions(decoder: Decoder) -> bool:
    """Whether numbers depend on a token's position in the text, not only on the distance of two tokens.

    Else positions are counted from the start of the row, padding on the left included, and the input `position_ids`
    says by its size which positions get logits. Programs that know nothing of this give all, and get all.
    """
    attentions = [layer.attention for layer in decoder.layers if isinstance(layer.attention, Attention)]
    return decoder.positions is not None or any(
        attention.query_scale is not None or (attention.rotary is not None and attention.norm_after_rotary)
        for attention in attentions
    )


def _embed(graph: GraphBuilder, decoder: Decoder) -> str:
    table = graph.constant(f"{decoder.embedding_name}.weight", decoder.embedding)
    x = graph.node("Gather", [table, "input_ids"], "embedding")
    if decoder.embedding_scale != 1:
        x = graph.node("Mul", [x, graph.number("embedding.scale", decoder.embedding_scale)], "embedding.scaled")
    if decoder.positions is not None:
        places = "position_ids"
        if decoder.first_position:
            places = graph.node("Add", [places, graph.ints(decoder.first_position)], "positions.rows")
        learned = graph.node("Gather", [graph.constant("positions.weight", decoder.positions), places], "positions")
        x = graph.node("Add", [x, learned], "embedding.placed")
    x = graph.norm(x, decoder.embedding_norm) if decoder.embedding_norm else x
    if decoder.token_inputs:
        write_token_inputs(graph, decoder.token_inputs, len(decoder.layers), x)
    return x


def _layers(graph: GraphBuilder, decoder: Decoder, x: str) -> str:
    """Add the layers and the last norm. Each residual sum is fused with the norm that follows it."""
    first = decoder.layers[0].before_attention
    h = graph.norm(x, first) if first else x
    following = [layer.before_attention for layer in decoder.layers[1:]] + [decoder.norm]
    for index, (layer, after) in enumerate(zip(decoder.layers, following, strict=True)):
        attended = _mix(graph, layer, index, h)
        if layer.after_attention:
            attended = graph.norm(attended, layer.after_attention)
        if layer.parallel:
            if layer.before_mlp is not layer.before_attention:
                h = graph.norm(x, layer.before_mlp) if layer.before_mlp else x
            x = graph.node("Add", [x, attended], f"{layer.name}.attended")
        else:
            x, h = graph.add_and_norm(x, attended, layer.before_mlp, f"{layer.name}.attended")
        if isinstance(layer.mlp, Experts):
            y = write_experts(graph, layer.mlp, layer.name, h)
        else:
            y = write_mlp(graph, layer.mlp, layer.name, h)
        if layer.after_mlp:
            y = graph.norm(y, layer.after_mlp)
        if layer.token_input or layer.scale != 1:
            x = write_layer_end(graph, layer, index, graph.node("Add", [x, y], f"{layer.name}.mlp.added"))
            h = graph.norm(x, after) if after else x
        else:
            x, h = graph.add_and_norm(x, y, after, f"{layer.name}.out")
    return h


def _mix(graph: GraphBuilder, layer: Layer, index: int, x: str) -> str:
    """Write the layer's attention, or what stands in its place."""
    if isinstance(layer.attention, ShortConvolution):
        return write_short_convolution(graph, layer.attention, layer.name, index, x)
    if isinstance(layer.attention, GatedDelta):
        return write_gated_delta(graph, layer.attention, layer.name, index, x)
    return write_attention(graph, layer.attention, layer.name, index, x)


def _mask(graph: GraphBuilder, decoder: Decoder) -> None:
    """Convert attention_mask (B, T) to the inputs of GroupQueryAttention.

    The length of a row ends at its last 1. MASKED_SCORE is added to the scores of zeros before it (left padding).
    """
    from onnx import TensorProto

    mask = graph.node("Cast", ["attention_mask"], "mask.int32", to=TensorProto.INT32)
    last = graph.node("ArgMax", [mask], "mask.last", axis=1, keepdims=0, select_last_index=1)
    graph.node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
    total = graph.node("Shape", ["attention_mask"], "mask.length", start=1, end=2)
    graph.node("Cast", [total], "total_sequence_length", to=TensorProto.INT32)
    visible = graph.node("Cast", ["attention_mask"], "mask.visible", to=TensorProto.BOOL)
    added = graph.node(
        "Where", [visible, graph.number("mask.zero", 0.0), graph.number("mask.masked", MASKED_SCORE)], "mask.added"
    )
    row = graph.node("Unsqueeze", [added, graph.ints(1, 2)], "mask.row")  # (B, 1, 1, T)
    if decoder.alibi is not None:
        row = graph.node("Add", [row, _alibi(graph, decoder.alibi)], "mask.alibi")  # (B, heads, 1, T)
    length = graph.node("Shape", ["input_ids"], "input.length", start=1, end=2)
    shape = graph.node("Concat", [graph.ints(1), graph.ints(1), length, graph.ints(1)], "mask.shape", axis=0)
    graph.node("Expand", [row, shape], "attention_bias")  # (B, 1 or heads, S, T)


def _columns(graph: GraphBuilder) -> None:
    """Compute the column of each new token in its row, padding included: (B, S).

    Rows of different lengths are in one run without a past, or with one new token each.
    """
    from onnx import TensorProto

    new = graph.node("Cast", ["input.length"], "columns.new", to=TensorProto.INT32)
    past = graph.node("Sub", ["total_sequence_length", new], "columns.past")
    first = graph.node("Min", [past, "seqlens_k"], "columns.first")  # (B,)
    first = graph.node("Cast", [first], "columns.first.int64", to=TensorProto.INT64)
    count = graph.node("Squeeze", ["input.length"], "columns.count")
    zero, one = (graph.constant(f"columns.{number}", np.array(number, np.int64)) for number in (0, 1))
    following = graph.node("Range", [zero, count, one], "columns.following")
    graph.node("Add", [graph.node("Unsqueeze", [first, graph.ints(1)], "columns.row"), following], COLUMNS)


def _alibi(graph: GraphBuilder, slopes: np.ndarray) -> str:
    """Multiply the position of each key by the slope of each head: (B, heads, 1, T)."""
    from onnx import TensorProto

    counted = graph.node("CumSum", ["attention_mask", graph.ints(1)], "alibi.counted")
    places = graph.node("Sub", [counted, graph.ints(1)], "alibi.places")
    numbers = graph.node("Cast", [places], "alibi.numbers", to=TensorProto.FLOAT)
    row = graph.node("Unsqueeze", [numbers, graph.ints(1, 2)], "alibi.row")
    return graph.node("Mul", [row, graph.constant("alibi.slopes", slopes.reshape(1, -1, 1, 1))], "alibi")


def _logits(graph: GraphBuilder, decoder: Decoder, x: str) -> str:
    if not _needs_positions(decoder):
        x = _last_positions(graph, x)
    if decoder.head:
        y = graph.linear(x, decoder.head)
    else:
        # onnxruntime packs a constant weight for this product: a second copy of the table beside the one for the
        # lookup. A Reshape with a shape computed at run time prevents that, and copies nothing itself. The shape
        # is input sizes * 0; a 0 in a shape keeps the size. onnxruntime does not see that it is constant.
        shape = graph.node("Mul", [graph.node("Shape", ["input_ids"], "lm_head.sizes"), graph.ints(0)], "lm_head.shape")
        table = graph.node("Reshape", [f"{decoder.embedding_name}.weight", shape], "lm_head.table")
        y = graph.node("FusedMatMul", [x, table], "lm_head.out", domain="com.microsoft", transB=1)
        if decoder.head_bias is not None:
            y = graph.node("Add", [y, graph.constant("lm_head.bias", decoder.head_bias)], "lm_head.biased")
    if decoder.logit_scale != 1:
        y = graph.node("Mul", [y, graph.number("logits.scale", decoder.logit_scale)], "logits.scaled")
    if decoder.logit_softcap:
        cap = graph.number("logits.softcap", decoder.logit_softcap)
        y = graph.node("Tanh", [graph.node("Div", [y, cap], "logits.divided")], "logits.squashed")
        y = graph.node("Mul", [y, cap], "logits.capped")
    graph.nodes[-1].output[0] = "logits"
    return "logits"


def _rename(graph: GraphBuilder, old: str, new: str) -> None:
    """Rename a tensor."""
    for node in graph.nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _last_positions(graph: GraphBuilder, x: str) -> str:
    """Keep the positions of x (B, S, H) whose `position_ids` are given: all, or the last ones of a prompt."""
    count = graph.node("Shape", ["position_ids"], "kept.count", start=1, end=2)
    start = graph.node("Neg", [count], "kept.start")
    return graph.node("Slice", [x, start, graph.ints(2**63 - 1), graph.ints(1)], "kept")


def _signature(decoder: Decoder) -> tuple[list[Any], list[Any]]:
    """Return the graph's inputs and outputs, with the names and order of optimum's."""
    from onnx import TensorProto, helper

    def value(name: str, kind: int, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    batch, new, past = "batch_size", "sequence_length", "past_sequence_length"
    total = f"{past} + {new}"
    inputs = [
        value("input_ids", TensorProto.INT64, batch, new),
        value("attention_mask", TensorProto.INT64, batch, total),
        value("position_ids", TensorProto.INT64, batch, new),
    ]
    width = decoder.head.weight.shape[1] if decoder.head else len(decoder.embedding)
    outputs = [value("logits", TensorProto.FLOAT, batch, new, width)]
    for index, layer in enumerate(decoder.layers):
        for part, before, after in _cache_shapes(layer.attention, past, total):
            inputs.append(value(f"past_key_values.{index}.{part}", TensorProto.FLOAT, batch, *before))
            outputs.append(value(f"present.{index}.{part}", TensorProto.FLOAT, batch, *after))
    return inputs, outputs


def _cache_shapes(mixer: Attention | ShortConvolution | GatedDelta, past: str, total: str) -> list[Any]:
    """Return the name of each part of a layer's cache, and its shapes for one row, before and after a run."""
    if isinstance(mixer, Attention):
        heads, size = mixer.kv_heads, mixer.head_size
        parts = ("key", "value") if mixer.kv_layer is None else ()
        return [(part, (heads, past, size), (heads, total, size)) for part in parts]
    channels, width = mixer.convolution.weight.shape
    shapes: dict[str, tuple[int, ...]] = {"conv": (width - 1, channels)}
    if isinstance(mixer, GatedDelta):
        shapes["recurrent"] = (mixer.value_heads, mixer.value_size, mixer.key_size)
    return [(part, shape, shape) for part, shape in shapes.items()]
