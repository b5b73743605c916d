"""GPT-NeoX, GPT-J, CodeGen and Falcon: rotary embedding, layer norms, an MLP without gate, mostly beside attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from limbeck.export.graph.decoder import MLP, Attention, Decoder, Layer, Linear, Norm, Rotary
from limbeck.export.graph.families.parts import (
    assemble_decoder,
    mlp_activation,
    reorder_columns,
    reorder_qkv,
    rotary_positions,
)
from limbeck.export.graph.reader import ModelReader, UnsupportedModel

CODEGEN_SHARDS = 4  # CodeGen's products are stored as the four machines of its training had them


def describe_gpt_neox(reader: ModelReader, model: Any) -> Decoder:
    """Describe GPT-NeoX and Pythia."""
    config, body = model.config, model.gpt_neox
    positions, limit = rotary_positions(config)
    rotary = reader.rotary(body.rotary_emb, positions)
    layers = []
    for layer in body.layers:
        attn, heads, size = layer.attention, config.num_attention_heads, layer.attention.head_size
        qkv = reorder_qkv(reader.linear(attn.query_key_value), heads, size)
        attention = Attention(qkv, reader.linear(attn.dense), heads, heads, size, float(attn.scaling), rotary)
        mlp = _read_mlp(reader, layer.mlp, "dense_h_to_4h", "dense_4h_to_h")
        norms = (reader.norm(layer.input_layernorm), reader.norm(layer.post_attention_layernorm))
        layers.append(Layer(reader.name(layer), attention, mlp, *norms, parallel=config.use_parallel_residual))
    return assemble_decoder(reader, model, body.embed_in, layers, body.final_layer_norm, max_positions=limit)


def describe_gptj(reader: ModelReader, model: Any) -> Decoder:
    """Describe GPT-J and CodeGen. Raises UnsupportedModel if the configuration has no `rotary_dim`."""
    config, body = model.config, model.transformer
    if not config.rotary_dim:
        raise UnsupportedModel("no rotary_dim")
    rotary = _gptj_rotary(reader, body.rotary_emb, config.max_position_embeddings)
    layers = []
    for layer in body.h:
        attn, heads, size = layer.attn, layer.attn.num_attention_heads, layer.attn.head_dim
        if hasattr(attn, "qkv_proj"):
            qkv = _reorder_codegen(reader.linear(attn.qkv_proj))
        else:
            qkv = reader.concatenate_linears(f"{reader.name(attn)}.qkv_proj", attn.q_proj, attn.k_proj, attn.v_proj)
        attention = Attention(qkv, reader.linear(attn.out_proj), heads, heads, size, float(attn.scaling), rotary)
        mlp = _read_mlp(reader, layer.mlp, "fc_in", "fc_out")
        norm = reader.norm(layer.ln_1)
        layers.append(Layer(reader.name(layer), attention, mlp, norm, norm, parallel=True))
    return assemble_decoder(reader, model, body.wte, layers, body.ln_f)


def _gptj_rotary(reader: ModelReader, module: Any, positions: int) -> Rotary:
    import torch

    with torch.inference_mode():
        sin, cos = module(torch.zeros(1), torch.arange(positions)[None])
    return Rotary(reader.name(module), cos[0].numpy(), sin[0].numpy(), interleaved=True)


def _reorder_codegen(linear: Linear) -> Linear:
    """Reorder the outputs (queries, values, keys of shard 0, then of shard 1, ...) to all queries, keys, values."""
    shards = np.arange(linear.weight.shape[1]).reshape(CODEGEN_SHARDS, 3, -1)
    return reorder_columns(linear, shards[:, [0, 2, 1]].transpose(1, 0, 2))


def describe_falcon(reader: ModelReader, model: Any) -> Decoder:
    """Describe Falcon: the 7B, the 40B and 180B ("new decoder architecture") and Falcon 2.

    Raises UnsupportedModel for the models with ALiBi, to whose scores transformers' eager attention adds it twice.
    """
    config, body = model.config, model.transformer
    if config.alibi:
        raise UnsupportedModel("ALiBi, which transformers adds once or twice, by its kind of attention")
    if config.new_decoder_architecture and not config.parallel_attn:
        raise UnsupportedModel("new_decoder_architecture without parallel_attn")
    positions, limit = rotary_positions(config)
    rotary = reader.rotary(body.rotary_emb, positions)
    layers = []
    for layer in body.h:
        attn, heads, size = layer.self_attention, layer.self_attention.num_heads, layer.self_attention.head_dim
        qkv = _reorder_falcon(reader.linear(attn.query_key_value), heads, attn.num_kv_heads, size)
        output, scale = reader.linear(attn.dense), float(attn.inv_norm_factor)
        attention = Attention(qkv, output, heads, attn.num_kv_heads, size, scale, rotary)
        mlp = _read_mlp(reader, layer.mlp, "dense_h_to_4h", "dense_4h_to_h")
        norms = _falcon_norms(reader, layer)
        layers.append(Layer(reader.name(layer), attention, mlp, *norms, parallel=config.parallel_attn))
    return assemble_decoder(reader, model, body.word_embeddings, layers, body.ln_f, max_positions=limit)


def _reorder_falcon(linear: Linear, heads: int, kv_heads: int, size: int) -> Linear:
    """Reorder the outputs (queries, key, value of key head 0, then of 1, ...) to all queries, keys, values."""
    groups = np.arange(linear.weight.shape[1]).reshape(kv_heads, heads // kv_heads + 2, size)
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return reorder_columns(linear, np.concatenate([part.ravel() for part in parts]))


def _falcon_norms(reader: ModelReader, layer: Any) -> tuple[Norm, Norm]:
    if hasattr(layer, "ln_attn"):
        return reader.norm(layer.ln_attn), reader.norm(layer.ln_mlp)
    first = reader.norm(layer.input_layernorm)
    return first, reader.norm(layer.post_attention_layernorm) if hasattr(layer, "post_attention_layernorm") else first


def _read_mlp(reader: ModelReader, mlp: Any, up: str, down: str) -> MLP:
    return MLP(reader.linear(getattr(mlp, up)), reader.linear(getattr(mlp, down)), mlp_activation(mlp))
