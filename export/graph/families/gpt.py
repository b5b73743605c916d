"""GPT-2 and others whose positions are added to the embedding: layer norms, an MLP without a gate."""

from __future__ import annotations

from typing import Any

from limbeck.export.graph.decoder import MLP, Attention, Decoder, Layer
from limbeck.export.graph.families.parts import (
    assemble_decoder,
    first_part,
    mlp_activation,
    read_activation,
    reorder_qkv,
)
from limbeck.export.graph.reader import ModelReader, UnsupportedModel


def describe_gpt2(reader: ModelReader, model: Any) -> Decoder:
    """Describe GPT-2."""
    config, body = model.config, model.transformer
    heads, size = config.n_head, config.n_embd // config.n_head
    layers = []
    for index, layer in enumerate(body.h):
        scale = size**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        qkv, output = reader.linear(layer.attn.c_attn), reader.linear(layer.attn.c_proj)
        attention = Attention(qkv, output, heads, heads, size, scale)
        layers.append(_gpt_layer(reader, layer, attention))
    return assemble_decoder(reader, model, body.wte, layers, body.ln_f, positions=reader.array(body.wpe.weight))


def describe_gpt_bigcode(reader: ModelReader, model: Any) -> Decoder:
    """Describe GPT-BigCode: StarCoder, SantaCoder."""
    body, layers = model.transformer, []
    for layer in body.h:
        attn, qkv = layer.attn, reader.linear(layer.attn.c_attn)
        if not attn.multi_query:
            qkv = reorder_qkv(qkv, attn.num_heads, attn.head_dim)
        output = reader.linear(attn.c_proj)
        attention = Attention(qkv, output, attn.num_heads, attn.kv_heads, attn.head_dim, float(attn.scaling))
        layers.append(_gpt_layer(reader, layer, attention))
    return assemble_decoder(reader, model, body.wte, layers, body.ln_f, positions=reader.array(body.wpe.weight))


def describe_gpt_neo(reader: ModelReader, model: Any) -> Decoder:
    """Describe GPT-Neo, whose scores have no scale, and some of whose layers have a window."""
    config, body, layers = model.config, model.transformer, []
    for layer in body.h:
        attn = layer.attn.attention
        qkv = reader.concatenate_linears(f"{reader.name(attn)}.qkv_proj", attn.q_proj, attn.k_proj, attn.v_proj)
        window = config.window_size if layer.attn.attention_type == "local" else -1
        heads, output = attn.num_heads, reader.linear(attn.out_proj)
        attention = Attention(qkv, output, heads, heads, attn.head_dim, 1.0, window=window)
        layers.append(_gpt_layer(reader, layer, attention))
    return assemble_decoder(reader, model, body.wte, layers, body.ln_f, positions=reader.array(body.wpe.weight))


def _gpt_layer(reader: ModelReader, layer: Any, attention: Attention) -> Layer:
    mlp = MLP(reader.linear(layer.mlp.c_fc), reader.linear(layer.mlp.c_proj), mlp_activation(layer.mlp))
    return Layer(reader.name(layer), attention, mlp, reader.norm(layer.ln_1), reader.norm(layer.ln_2))


def describe_opt(reader: ModelReader, model: Any) -> Decoder:
    """Describe OPT. Raises UnsupportedModel for the 350m model, whose norms follow attention and MLP."""
    config, body = model.config, model.model.decoder
    if not config.do_layer_norm_before or body.final_layer_norm is None:
        raise UnsupportedModel("norms after each part only")
    return _describe_like_opt(reader, model, body)


def describe_xglm(reader: ModelReader, model: Any) -> Decoder:
    """Describe XGLM, whose positions are fixed."""
    return _describe_like_opt(reader, model, model.model)


def describe_biogpt(reader: ModelReader, model: Any) -> Decoder:
    """Describe BioGPT."""
    return _describe_like_opt(reader, model, model.biogpt)


def _describe_like_opt(reader: ModelReader, model: Any, body: Any) -> Decoder:
    layers = []
    for layer in body.layers:
        attn, heads = layer.self_attn, layer.self_attn.num_heads
        qkv = reader.concatenate_linears(f"{reader.name(attn)}.qkv_proj", attn.q_proj, attn.k_proj, attn.v_proj)
        scale = float(attn.scaling)
        attention = Attention(qkv, reader.linear(attn.out_proj), heads, heads, attn.head_dim, scale)
        mlp = MLP(reader.linear(layer.fc1), reader.linear(layer.fc2), read_activation(layer.activation_fn))
        norms = (reader.norm(layer.self_attn_layer_norm), reader.norm(layer.final_layer_norm))
        layers.append(Layer(reader.name(layer), attention, mlp, *norms))
    positions = body.embed_positions
    return assemble_decoder(
        reader,
        model,
        body.embed_tokens,
        layers,
        first_part(body, "final_layer_norm", "layer_norm"),
        positions=reader.array(first_part(positions, "weight", "weights")),
        first_position=positions.offset,
    )
