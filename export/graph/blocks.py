"""Write the blocks of a layer, attention and MLP, as fused operators.

Attention is com.microsoft's GroupQueryAttention: cache and products in one operator. It writes new keys and values in
place if past and present are the same buffer. Queries, keys and values come from one product.
"""

from __future__ import annotations

from limbeck.export.graph.builder import GraphBuilder
from limbeck.export.graph.decoder import MLP, Attention, Rotary


def write_attention(graph: GraphBuilder, attention: Attention, name: str, index: int, x: str) -> str:
    """Write the attention of layer `index`, whose name is `name`, over x (B, S, H). Returns its output, (B, S, H)."""
    qkv, rotary = [graph.linear(x, attention.qkv), "", ""], attention.rotary
    if rotary or attention.q_norm:
        qkv = _split(graph, attention, name, qkv[0])
    if rotary:
        # GroupQueryAttention could rotate too, but for a prompt it counts positions from the start of the row,
        # which is wrong for a row with left padding.
        for part, heads in enumerate((attention.heads, attention.kv_heads)):
            qkv[part] = _rotate(graph, qkv[part], rotary, heads)
    cache = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
    lengths = ["seqlens_k", "total_sequence_length"]
    out = graph.node(
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
    return graph.linear(out, attention.output)


def _split(graph: GraphBuilder, attention: Attention, name: str, qkv: str) -> list[str]:
    """Split queries, keys and values, and apply the norms of queries and keys if there are any."""
    heads = (attention.heads, attention.kv_heads, attention.kv_heads)
    parts = [f"{name}.query", f"{name}.key", f"{name}.value"]
    graph.node("Split", [qkv, graph.ints(*(n * attention.head_size for n in heads))], *parts, axis=-1)
    for part, norm in enumerate((attention.q_norm, attention.k_norm)):
        if norm and len(norm.weight) == attention.head_size:  # a norm per head
            each = graph.node(
                "Reshape", [parts[part], graph.ints(0, 0, -1, attention.head_size)], f"{parts[part]}.heads"
            )
            normed, width = graph.norm(each, norm), heads[part] * attention.head_size
            parts[part] = graph.node("Reshape", [normed, graph.ints(0, 0, width)], f"{parts[part]}.normed")
        elif norm:
            parts[part] = graph.norm(parts[part], norm)
    return parts


def _rotate(graph: GraphBuilder, x: str, rotary: Rotary, heads: int) -> str:
    tables = [graph.constant(f"{rotary.name}.cos", rotary.cos), graph.constant(f"{rotary.name}.sin", rotary.sin)]
    return graph.node(
        "RotaryEmbedding",
        [x, "position_ids", *tables],
        f"{x}.rotated",
        domain="com.microsoft",
        num_heads=heads,
        rotary_embedding_dim=2 * rotary.cos.shape[1],
    )


def write_mlp(graph: GraphBuilder, mlp: MLP, name: str, x: str) -> str:
    """Write an MLP over x (B, S, H). Returns its output, (B, S, H)."""
    up = graph.linear(x, mlp.up)
    inner = graph.linear(x, mlp.gate) if mlp.gate else up
    y = graph.activation(inner, mlp.activation, f"{name}.mlp.act")
    if mlp.gate:
        y = graph.node("Mul", [y, up], f"{name}.mlp.gated")
    return graph.linear(y, mlp.down)
