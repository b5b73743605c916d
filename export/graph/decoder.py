"""Write a decoder-only transformer as an ONNX graph of onnxruntime's fused operators.

Attention is com.microsoft's GroupQueryAttention: cache and products in one operator. It writes new keys and values in
place if past and present are the same buffer. Queries, keys and values come from one product. A residual sum and the
norm after it are one operator. Tensor names and shapes are those of optimum's graph, so that programs read both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.export.graph.save import save_graph

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 21, 10
# Added to the scores of masked positions: exp() of it is 0, float16 can hold it, and a row of it gives no NaN.
MASKED_SCORE = -30000.0


@dataclass(frozen=True)
class Linear:
    """x @ weight + bias, with float32 weight (in, out) and bias (out,) or None."""

    name: str
    weight: np.ndarray
    bias: np.ndarray | None = None


@dataclass(frozen=True)
class Norm:
    """RMS norm (Zhang and Sennrich, arXiv 1910.07467), or layer norm if there is a bias: (H,) float32 each."""

    name: str
    weight: np.ndarray
    bias: np.ndarray | None
    eps: float


@dataclass(frozen=True)
class Rotary:
    """Tables of a rotary embedding (Su et al., arXiv 2104.09864): cos and sin, (positions, rotated / 2) float32."""

    name: str
    cos: np.ndarray
    sin: np.ndarray


@dataclass(frozen=True)
class Attention:
    """Causal attention of `heads` query heads that share `kv_heads` (Ainslie et al., arXiv 2305.13245).

    Attributes:
        qkv: its outputs are the queries of all heads, then the keys, then the values.
        scale: multiplies the scores.
        rotary: None if the layer has no rotary embedding.
        window: a position sees the last `window` positions, including itself; -1 is all.
        softcap: if not 0, scores become softcap * tanh(score / softcap).
        q_norm, k_norm: norms of queries and keys, per head if their weight has `head_size` entries; may be None.
    """

    qkv: Linear
    output: Linear
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    rotary: Rotary | None = None
    window: int = -1
    softcap: float = 0.0
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class MLP:
    """down(act(up(x))), or down(act(gate(x)) * up(x)) if there is a gate (Shazeer, arXiv 2002.05202)."""

    up: Linear
    down: Linear
    activation: str  # a key of ACTIVATIONS
    gate: Linear | None = None


@dataclass(frozen=True)
class Layer:
    """x += after_attention(attention(before_attention(x))), then the same with the MLP; a norm may be None.

    In a parallel layer, attention and MLP both read the layer's input.
    """

    name: str
    attention: Attention
    mlp: MLP
    before_attention: Norm | None
    before_mlp: Norm | None
    after_attention: Norm | None = None
    after_mlp: Norm | None = None
    parallel: bool = False


@dataclass(frozen=True)
class Decoder:
    """A model: everything that its graph depends on.

    Attributes:
        embedding: (V, H) float32, multiplied by `embedding_scale`.
        norm: the norm after the last layer.
        head: None if the head is tied to the embedding.
        embedding_norm: norm of the embedding, or None.
        positions: learned positions, (positions, H) float32, or None; position 0 is row `first_position`.
        head_bias: bias of a tied head, (V,) float32, or None.
        logit_scale: multiplies the logits; then, if logit_softcap is not 0, they become
            logit_softcap * tanh(logit / logit_softcap).
    """

    embedding_name: str
    embedding: np.ndarray
    layers: list[Layer]
    norm: Norm
    head: Linear | None
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    positions: np.ndarray | None = None
    first_position: int = 0
    head_bias: np.ndarray | None = None
    logit_scale: float = 1.0
    logit_softcap: float = 0.0


# Activation -> (operator, its domain, its attributes).
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "silu": ("QuickGelu", "com.microsoft", {"alpha": 1.0}),
    "quick_gelu": ("QuickGelu", "com.microsoft", {"alpha": 1.702}),
    "gelu": ("Gelu", "", {}),
    "gelu_tanh": ("Gelu", "", {"approximate": "tanh"}),
    "relu": ("Relu", "", {}),
}


def write_graph(decoder: Decoder, path: Path) -> None:
    """Write the graph to `path`, and weights of more than 16 MB to `<path>_data`.

    The same decoder gives the same bytes.
    """
    save_graph(_Writer().model(decoder), path, consume=True)


@dataclass
class _Writer:
    """Collects nodes and initializers. Methods take and return names of tensors."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def model(self, decoder: Decoder) -> onnx.ModelProto:
        from onnx import helper

        self._mask(decoder)
        self._logits(decoder, self._layers(decoder, self._embed(decoder)))
        inputs, outputs = _signature(decoder)
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, producer_name="limbeck", opset_imports=opsets, ir_version=IR_VERSION)
        helper.set_model_props(model, {"limbeck.graph": "fused"})
        return model

    def node(
        self, op: str, inputs: list[str], output: str, *more: str, domain: str = "", name: str = "", **attributes: Any
    ) -> str:
        """Add a node, named after its first output. Returns that output."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output, *more], name or output, domain=domain, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer, unless there is one of this name: that one is assumed to be equal."""
        from onnx import numpy_helper

        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def number(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, np.float32))

    def ints(self, *values: int) -> str:
        return self.constant("ints." + "_".join(map(str, values)), np.array(values, np.int64))

    def linear(self, x: str, linear: Linear) -> str:
        y = self.node("MatMul", [x, self.constant(f"{linear.name}.weight", linear.weight)], f"{linear.name}.out")
        if linear.bias is None:
            return y
        return self.node("Add", [y, self.constant(f"{linear.name}.bias", linear.bias)], f"{linear.name}.biased")

    def norm(self, x: str, norm: Norm) -> str:
        weight, out = self.constant(f"{norm.name}.weight", norm.weight), f"{norm.name}.out"
        if norm.bias is None:
            return self.node("SimplifiedLayerNormalization", [x, weight], out, axis=-1, epsilon=norm.eps, stash_type=1)
        bias = self.constant(f"{norm.name}.bias", norm.bias)
        return self.node("LayerNormalization", [x, weight, bias], out, axis=-1, epsilon=norm.eps)

    def add_and_norm(self, x: str, y: str, norm: Norm | None, total: str) -> tuple[str, str]:
        """Compute x + y and its norm in one operator. Returns (sum, normed sum); they are the same if norm is None."""
        if norm is None:
            added = self.node("Add", [x, y], total)
            return added, added
        inputs = [x, y, self.constant(f"{norm.name}.weight", norm.weight)]
        op = "SkipSimplifiedLayerNormalization"
        if norm.bias is not None:
            op = "SkipLayerNormalization"
            inputs.append(self.constant(f"{norm.name}.bias", norm.bias))
        out = self.node(op, inputs, f"{norm.name}.out", "", "", total, domain="com.microsoft", epsilon=norm.eps)
        return total, out

    def _mask(self, decoder: Decoder) -> None:
        """Convert attention_mask (B, T) to the inputs of GroupQueryAttention.

        The length of a row ends at its last 1. MASKED_SCORE is added to the scores of zeros before it (left padding).
        """
        from onnx import TensorProto

        mask = self.node("Cast", ["attention_mask"], "mask.int32", to=TensorProto.INT32)
        last = self.node("ArgMax", [mask], "mask.last", axis=1, keepdims=0, select_last_index=1)
        self.node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        total = self.node("Shape", ["attention_mask"], "mask.length", start=1, end=2)
        self.node("Cast", [total], "total_sequence_length", to=TensorProto.INT32)
        visible = self.node("Cast", ["attention_mask"], "mask.visible", to=TensorProto.BOOL)
        added = self.node(
            "Where", [visible, self.number("mask.zero", 0.0), self.number("mask.masked", MASKED_SCORE)], "mask.added"
        )
        row = self.node("Unsqueeze", [added, self.ints(1, 2)], "mask.row")  # (B, 1, 1, T)
        length = self.node("Shape", ["input_ids"], "input.length", start=1, end=2)
        shape = self.node("Concat", [self.ints(1), self.ints(1), length, self.ints(1)], "mask.shape", axis=0)
        self.node("Expand", [row, shape], "attention_bias")  # (B, 1, S, T)

    def _embed(self, decoder: Decoder) -> str:
        table = self.constant(f"{decoder.embedding_name}.weight", decoder.embedding)
        x = self.node("Gather", [table, "input_ids"], "embedding")
        if decoder.embedding_scale != 1:
            x = self.node("Mul", [x, self.number("embedding.scale", decoder.embedding_scale)], "embedding.scaled")
        if decoder.positions is not None:
            places = "position_ids"
            if decoder.first_position:
                places = self.node("Add", [places, self.ints(decoder.first_position)], "positions.rows")
            learned = self.node("Gather", [self.constant("positions.weight", decoder.positions), places], "positions")
            x = self.node("Add", [x, learned], "embedding.placed")
        return self.norm(x, decoder.embedding_norm) if decoder.embedding_norm else x

    def _layers(self, decoder: Decoder, x: str) -> str:
        """Add the layers and the last norm. Each residual sum is fused with the norm that follows it."""
        first = decoder.layers[0].before_attention
        h = self.norm(x, first) if first else x
        following = [layer.before_attention for layer in decoder.layers[1:]] + [decoder.norm]
        for index, (layer, after) in enumerate(zip(decoder.layers, following, strict=True)):
            attended = self._attention(layer.attention, layer.name, index, h)
            if layer.after_attention:
                attended = self.norm(attended, layer.after_attention)
            if layer.parallel:
                if layer.before_mlp is not layer.before_attention:
                    h = self.norm(x, layer.before_mlp) if layer.before_mlp else x
                x = self.node("Add", [x, attended], f"{layer.name}.attended")
            else:
                x, h = self.add_and_norm(x, attended, layer.before_mlp, f"{layer.name}.attended")
            y = self._mlp(layer.mlp, layer.name, h)
            if layer.after_mlp:
                y = self.norm(y, layer.after_mlp)
            x, h = self.add_and_norm(x, y, after, f"{layer.name}.out")
        return h

    def _attention(self, attention: Attention, name: str, index: int, x: str) -> str:
        qkv, rotary = [self.linear(x, attention.qkv), "", ""], attention.rotary
        if rotary or attention.q_norm:
            qkv = self._split(attention, name, qkv[0])
        if rotary:
            # GroupQueryAttention could rotate too, but for a prompt it counts positions from the start of the row,
            # which is wrong for a row with left padding.
            for part, heads in enumerate((attention.heads, attention.kv_heads)):
                qkv[part] = self._rotate(qkv[part], rotary, heads)
        cache = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        lengths = ["seqlens_k", "total_sequence_length"]
        out = self.node(
            "GroupQueryAttention",
            [*qkv, *cache, *lengths, "", "", "", "attention_bias"],
            f"{name}.attention",
            f"present.{index}.key",
            f"present.{index}.value",
            domain="com.microsoft",
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            scale=attention.scale,
            do_rotary=0,
            local_window_size=attention.window,
            softcap=attention.softcap,
        )
        return self.linear(out, attention.output)

    def _split(self, attention: Attention, name: str, qkv: str) -> list[str]:
        """Split queries, keys and values, and apply the norms of queries and keys if there are any."""
        heads = (attention.heads, attention.kv_heads, attention.kv_heads)
        parts = [f"{name}.query", f"{name}.key", f"{name}.value"]
        self.node("Split", [qkv, self.ints(*(n * attention.head_size for n in heads))], *parts, axis=-1)
        for part, norm in enumerate((attention.q_norm, attention.k_norm)):
            if norm and len(norm.weight) == attention.head_size:  # a norm per head
                each = self.node(
                    "Reshape", [parts[part], self.ints(0, 0, -1, attention.head_size)], f"{parts[part]}.heads"
                )
                normed, width = self.norm(each, norm), heads[part] * attention.head_size
                parts[part] = self.node("Reshape", [normed, self.ints(0, 0, width)], f"{parts[part]}.normed")
            elif norm:
                parts[part] = self.norm(parts[part], norm)
        return parts

    def _rotate(self, x: str, rotary: Rotary, heads: int) -> str:
        tables = [self.constant(f"{rotary.name}.cos", rotary.cos), self.constant(f"{rotary.name}.sin", rotary.sin)]
        return self.node(
            "RotaryEmbedding",
            [x, "position_ids", *tables],
            f"{x}.rotated",
            domain="com.microsoft",
            num_heads=heads,
            rotary_embedding_dim=2 * rotary.cos.shape[1],
        )

    def _mlp(self, mlp: MLP, name: str, x: str) -> str:
        op, domain, attributes = ACTIVATIONS[mlp.activation]
        up = self.linear(x, mlp.up)
        inner = self.linear(x, mlp.gate) if mlp.gate else up
        y = self.node(op, [inner], f"{name}.mlp.act", domain=domain, **attributes)
        if mlp.gate:
            y = self.node("Mul", [y, up], f"{name}.mlp.gated")
        return self.linear(y, mlp.down)

    def _logits(self, decoder: Decoder, x: str) -> str:
        if decoder.head:
            y = self.linear(x, decoder.head)
        else:
            # onnxruntime packs a constant weight for this product: a second copy of the table beside the one for the
            # lookup. A Reshape with a shape computed at run time prevents that, and copies nothing itself. The shape
            # is input sizes * 0; a 0 in a shape keeps the size. onnxruntime does not see that it is constant.
            shape = self.node(
                "Mul", [self.node("Shape", ["input_ids"], "lm_head.sizes"), self.ints(0)], "lm_head.shape"
            )
            table = self.node("Reshape", [f"{decoder.embedding_name}.weight", shape], "lm_head.table")
            y = self.node("FusedMatMul", [x, table], "lm_head.out", domain="com.microsoft", transB=1)
            if decoder.head_bias is not None:
                y = self.node("Add", [y, self.constant("lm_head.bias", decoder.head_bias)], "lm_head.biased")
        if decoder.logit_scale != 1:
            y = self.node("Mul", [y, self.number("logits.scale", decoder.logit_scale)], "logits.scaled")
        if decoder.logit_softcap:
            cap = self.number("logits.softcap", decoder.logit_softcap)
            y = self.node("Tanh", [self.node("Div", [y, cap], "logits.divided")], "logits.squashed")
            y = self.node("Mul", [y, cap], "logits.capped")
        self.nodes[-1].output[0] = "logits"
        return "logits"


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
    outputs = [value("logits", TensorProto.FLOAT, batch, new, len(decoder.embedding))]
    for index, layer in enumerate(decoder.layers):
        heads, size = layer.attention.kv_heads, layer.attention.head_size
        for part in ("key", "value"):
            inputs.append(value(f"past_key_values.{index}.{part}", TensorProto.FLOAT, batch, heads, past, size))
            outputs.append(value(f"present.{index}.{part}", TensorProto.FLOAT, batch, heads, total, size))
    return inputs, outputs
