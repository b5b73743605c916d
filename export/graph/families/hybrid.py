"""Hybrids: families of which some layers have attention, and others a recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from limbeck.export.graph.decoder import (
    MLP,
    Convolution,
    Decoder,
    Experts,
    GatedDelta,
    Layer,
    Linear,
    Norm,
    ShortConvolution,
)
from limbeck.export.graph.families.llama import Style, read_attention, read_norms
from limbeck.export.graph.families.mixture import read_experts
from limbeck.export.graph.families.parts import first_part, reorder_columns, rotary_positions
from limbeck.export.graph.reader import ModelReader, UnsupportedModel, join_linears


@dataclass(frozen=True)
class Hybrid:
    """How a hybrid family differs from Llama.

    Attributes:
        style: of the layers with attention.
        recurrence: the attribute of a layer without attention that has the recurrence.
        read_recurrence: reads it.
        read_gate: reads the gate of an attention module, or returns None.
    """

    style: Style
    recurrence: str
    read_recurrence: Callable[[ModelReader, Any], ShortConvolution | GatedDelta]
    read_gate: Callable[[ModelReader, Any], Linear | None] = lambda reader, module: None


def describe_hybrid(reader: ModelReader, model: Any, hybrid: Hybrid) -> Decoder:
    """Describe a model whose layers have an attention module `self_attn`, or a recurrence."""
    config, body, style = model.config, model.model, hybrid.style
    positions, limit = rotary_positions(config)
    rotary = reader.rotary(first_part(body, "rotary_emb", "pos_emb"), positions)
    layers = []
    for layer in body.layers:
        mlp, norms = style.read_mlp(reader, layer, config, 1.0), read_norms(reader, layer, style.norms)
        if hasattr(layer, hybrid.recurrence):
            recurrence = hybrid.read_recurrence(reader, getattr(layer, hybrid.recurrence))
            layers.append(Layer(reader.name(layer), recurrence, mlp, **norms))
        else:
            attention = read_attention(reader, layer.self_attn, config, style, rotary, 1.0)
            attention = replace(attention, gate=hybrid.read_gate(reader, layer.self_attn))
            layers.append(Layer(reader.name(layer), attention, mlp, **norms))
    embedding = body.embed_tokens
    head, head_bias = reader.head(model, embedding)
    return Decoder(
        reader.name(embedding),
        reader.array(embedding.weight),
        layers,
        reader.norm(first_part(body, "norm", "embedding_norm")),
        head,
        head_bias=head_bias,
        max_positions=limit,
    )


def _read_convolution(reader: ModelReader, module: Any) -> Convolution:
    """Read a torch Conv1d that convolves each channel alone."""
    bias = None if module.bias is None else reader.array(module.bias)
    return Convolution(reader.name(module), reader.array(module.weight)[:, 0], bias)


def _read_short_convolution(reader: ModelReader, module: Any) -> ShortConvolution:
    convolution = _read_convolution(reader, module.conv)
    return ShortConvolution(reader.linear(module.in_proj), convolution, reader.linear(module.out_proj))


def _read_lfm2_mlp(reader: ModelReader, layer: Any, config: Any, scale: float) -> MLP | Experts:
    mlp = layer.feed_forward
    if hasattr(mlp, "experts"):
        return read_experts(reader, layer, config, scale, sigmoid=True)
    return MLP(reader.linear(mlp.w3), reader.linear(mlp.w2, scale), "silu", reader.linear(mlp.w1))


def _read_gated_delta(reader: ModelReader, module: Any) -> GatedDelta:
    if module.activation not in ("silu", "swish"):
        raise UnsupportedModel(f"a convolution with the activation {module.activation!r}")
    norm = module.norm  # takes the gate too: reader.norm cannot run it
    inputs = (module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a)
    return GatedDelta(
        reader.concatenate_linears(f"{reader.name(module)}.in_proj", *inputs),
        _read_convolution(reader, module.conv1d),
        decay_bias=reader.array(module.dt_bias),
        decay_scale=-np.exp(reader.array(module.A_log)),
        norm=Norm(reader.name(norm), reader.array(norm.weight), None, float(norm.variance_epsilon)),
        output=reader.linear(module.out_proj),
        key_heads=module.num_k_heads,
        value_heads=module.num_v_heads,
        key_size=module.head_k_dim,
        value_size=module.head_v_dim,
    )


def _split_query_and_gate(reader: ModelReader, module: Any) -> tuple[Linear, Linear]:
    """Read Qwen3.5's q_proj, which gives the query of head 0, its gate, the query of head 1, and so on."""
    both, size = reader.linear(module.q_proj), module.head_dim
    order = np.arange(both.weight.shape[1]).reshape(-1, 2, size)
    query, gate = (reorder_columns(both, order[:, part]) for part in (0, 1))
    return query, replace(gate, name=f"{both.name}.gate")


def _read_gated_qkv(reader: ModelReader, module: Any) -> Linear:
    query, _ = _split_query_and_gate(reader, module)
    return join_linears(
        f"{reader.name(module)}.qkv_proj", query, reader.linear(module.k_proj), reader.linear(module.v_proj)
    )


def _read_gate(reader: ModelReader, module: Any) -> Linear:
    return _split_query_and_gate(reader, module)[1]


LFM2 = Hybrid(
    Style(norms=("operator_norm", None, "ffn_norm", None), read_mlp=_read_lfm2_mlp), "conv", _read_short_convolution
)
QWEN35 = Hybrid(Style(read_qkv=_read_gated_qkv, read_mlp=read_experts), "linear_attn", _read_gated_delta, _read_gate)
