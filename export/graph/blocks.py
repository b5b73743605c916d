"""Write the blocks of a layer, attention and MLP, as fused operators.

Attention is com.microsoft's GroupQueryAttention: cache and products in one operator. It writes new keys and values in
place if past and present are the same buffer. Queries, keys and values come from one product.
"""

from __future__ import annotations

import numpy as np

from limbeck.export.graph.builder import GraphBuilder
from limbeck.export.graph.decoder import MLP, Attention, Norm, Rotary

COLUMNS = "columns"  # of the new tokens in their rows, padding included


def write_attention(graph: GraphBuilder, attention: Attention, name: str, index: int, x: str) -> str:
    """Write the attention of layer `index`, whose name is `name`, over x (B, S, H). Returns its output, (B, S, H)."""
    qkv = [graph.linear(x, attention.qkv), "", ""]
    if attention.clip:
        limits = [graph.number("clip.min", -attention.clip), graph.number("clip.max", attention.clip)]
        qkv[0] = graph.node("Clip", [qkv[0], *limits], f"{name}.clipped")
    own = attention.kv_layer is None  # else the queries only
    rotated_inside = _is_rotated_inside(attention)
    if own and not rotated_inside and (attention.rotary or attention.q_norm or attention.query_scale is not None):
        qkv = _split(graph, attention, name, qkv[0])
    if not attention.norm_after_rotary:
        _norm_heads(graph, attention, qkv)
    if attention.rotary and not rotated_inside:
        for part, heads in enumerate((attention.heads, attention.kv_heads) if own else (attention.heads,)):
            qkv[part] = _rotate(graph, qkv[part], attention, heads)
    if attention.norm_after_rotary:
        _norm_heads(graph, attention, qkv)
    if attention.query_scale is not None:
        scales = graph.node(
            "Gather", [graph.constant("query.scales", attention.query_scale), "position_ids"], f"{name}.query.scales"
        )
        scales = graph.node("Unsqueeze", [scales, graph.ints(-1)], f"{name}.query.factors")
        qkv[0] = graph.node("Mul", [qkv[0], scales], f"{qkv[0]}.scaled")
    if attention.kv_layer is None:
        graph.keys_and_values[index] = qkv[1:]
    else:
        qkv[1:] = graph.keys_and_values[attention.kv_layer]
    y = _attend(graph, attention, name, index, qkv)
    if attention.gate:
        gate = graph.node("Sigmoid", [graph.linear(x, attention.gate)], f"{name}.attention.gate")
        y = graph.node("Mul", [y, gate], f"{name}.attention.gated")
    return graph.linear(y, attention.output)


def rotates_by_columns(attention: Attention) -> bool:
    """Whether the tensor COLUMNS is read: by the rotation of queries and keys before GroupQueryAttention."""
    return attention.rotary is not None and not _is_rotated_inside(attention) and not attention.norm_after_rotary


def _is_rotated_inside(attention: Attention) -> bool:
    """Whether GroupQueryAttention itself rotates queries and keys, by their columns: nothing is done in between."""
    between = (attention.q_norm, attention.k_norm, attention.v_norm, attention.query_scale)
    if attention.rotary is None or attention.kv_layer is not None or any(part is not None for part in between):
        return False
    return attention.head_size % 16 == 0 and attention.rotary.cos.shape[1] % 8 == 0  # the kernel asks for both


def _attend(graph: GraphBuilder, attention: Attention, name: str, index: int, qkv: list[str]) -> str:
    # A layer that reads another's keys and values gets the same inputs, and drops the cache that the operator returns.
    source, present = (index, "present") if attention.kv_layer is None else (attention.kv_layer, f"{name}.present")
    cache = [f"past_key_values.{source}.key", f"past_key_values.{source}.value"]
    rotary = attention.rotary if _is_rotated_inside(attention) else None
    tables = _tables(graph, rotary) if rotary else ["", ""]
    inputs = [*qkv, *cache, "seqlens_k", "total_sequence_length", *tables, "", "attention_bias"]
    if attention.sinks is not None:
        inputs.append(graph.constant(f"{name}.sinks", attention.sinks))
    return graph.node(
        "GroupQueryAttention",
        inputs,
        f"{name}.attention",
        f"{present}.{source}.key",
        f"{present}.{source}.value",
        domain="com.microsoft",
        num_heads=attention.heads,
        kv_num_heads=attention.kv_heads,
        scale=attention.scale,
        do_rotary=int(rotary is not None),
        rotary_interleaved=int(rotary is not None and rotary.interleaved),
        local_window_size=attention.window,
        softcap=attention.softcap,
    )


def _split(graph: GraphBuilder, attention: Attention, name: str, qkv: str) -> list[str]:
    """Split queries, keys and values."""
    heads = (attention.heads, attention.kv_heads, attention.kv_heads)
    parts = [f"{name}.query", f"{name}.key", f"{name}.value"]
    graph.node("Split", [qkv, graph.ints(*(n * attention.head_size for n in heads))], *parts, axis=-1)
    return parts


def _norm_heads(graph: GraphBuilder, attention: Attention, qkv: list[str]) -> None:
    """Replace queries, keys and values in `qkv` by what their norms make of them, if there are any."""
    heads, size = (attention.heads, attention.kv_heads, attention.kv_heads), attention.head_size
    for part, norm in enumerate((attention.q_norm, attention.k_norm, attention.v_norm)):
        x = qkv[part]
        if norm and norm.weight.shape[-1] == size:  # a norm per head
            each = graph.node("Reshape", [x, graph.ints(0, 0, -1, size)], f"{x}.heads")
            shape = graph.ints(0, 0, heads[part] * size)
            qkv[part] = graph.node("Reshape", [_norm_per_head(graph, each, norm), shape], f"{x}.normed")
        elif norm:
            qkv[part] = graph.norm(x, norm)


def _norm_per_head(graph: GraphBuilder, x: str, norm: Norm) -> str:
    """Norm x (B, S, heads, head_size). Weight and bias are the same for all heads, or have a row for each."""
    if norm.weight.ndim == 1:
        return graph.norm(x, norm)
    ones = np.ones(norm.weight.shape[1], np.float32)
    y = graph.norm(x, Norm(f"{norm.name}.same", ones, None if norm.bias is None else 0 * ones, norm.eps))
    y = graph.node("Mul", [y, graph.constant(f"{norm.name}.weight", norm.weight)], f"{norm.name}.weighed")
    if norm.bias is None or not norm.bias.any():
        return y
    return graph.node("Add", [y, graph.constant(f"{norm.name}.bias", norm.bias)], f"{norm.name}.biased")


def _tables(graph: GraphBuilder, rotary: Rotary) -> list[str]:
    return [graph.constant(f"{rotary.name}.cos", rotary.cos), graph.constant(f"{rotary.name}.sin", rotary.sin)]


def _rotate(graph: GraphBuilder, x: str, attention: Attention, heads: int) -> str:
    """Rotate x, which has `heads` heads, by columns: scores depend on the distance of two tokens only.

    With a norm between rotary and scores they depend on the positions too.
    """
    rotary = attention.rotary
    assert rotary is not None
    return graph.node(
        "RotaryEmbedding",
        [x, COLUMNS if rotates_by_columns(attention) else "position_ids", *_tables(graph, rotary)],
        f"{x}.rotated",
        domain="com.microsoft",
        interleaved=int(rotary.interleaved),
        num_heads=heads,
        rotary_embedding_dim=2 * rotary.cos.shape[1],
    )


def write_mlp(graph: GraphBuilder, mlp: MLP, name: str, x: str) -> str:
    """Write an MLP over x (B, S, H). Returns its output, (B, S, H)."""
    if mlp.gate is None:
        y = graph.activation(graph.linear(x, mlp.up), mlp.activation, f"{name}.mlp.act")
        return graph.linear(y, mlp.down)
    gate, up = f"{name}.mlp.gate", f"{name}.mlp.up"
    graph.linear_pair(x, mlp.gate, mlp.up, f"{name}.mlp.gate_up", (gate, up))
    y = graph.node("Mul", [graph.activation(gate, mlp.activation, f"{name}.mlp.act"), up], f"{name}.mlp.gated")
    return graph.linear(y, mlp.down)
