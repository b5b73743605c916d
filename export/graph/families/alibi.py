"""BLOOM and MPT: the distance of a key lowers its score (ALiBi), and nothing else says where a token is."""

from __future__ import annotations

from typing import Any

from limbeck.export.graph.decoder import MLP, Attention, Decoder, Layer
from limbeck.export.graph.families.parts import assemble_decoder, reorder_qkv
from limbeck.export.graph.reader import ModelReader, UnsupportedModel


def describe_bloom(reader: ModelReader, model: Any) -> Decoder:
    """Describe BLOOM. Raises UnsupportedModel if it adds the norms, not their inputs, to what attention returns."""
    import torch

    config, body = model.config, model.transformer
    if config.apply_residual_connection_post_layernorm:
        raise UnsupportedModel("apply_residual_connection_post_layernorm=True")
    layers = []
    for layer in body.h:
        attn, heads, size = layer.self_attention, layer.self_attention.num_heads, layer.self_attention.head_dim
        qkv = reorder_qkv(reader.linear(attn.query_key_value), heads, size)
        attention = Attention(qkv, reader.linear(attn.dense), heads, heads, size, float(attn.inv_norm_factor))
        mlp = MLP(reader.linear(layer.mlp.dense_h_to_4h), reader.linear(layer.mlp.dense_4h_to_h), "gelu_tanh")
        norms = (reader.norm(layer.input_layernorm), reader.norm(layer.post_attention_layernorm))
        layers.append(Layer(reader.name(layer), attention, mlp, *norms))
    places_0_and_1 = body.build_alibi_tensor(torch.ones(1, 2), body.num_heads, torch.float32)
    norm, alibi = reader.norm(body.word_embeddings_layernorm), places_0_and_1[:, 0, 1].numpy()
    return assemble_decoder(reader, model, body.word_embeddings, layers, body.ln_f, embedding_norm=norm, alibi=alibi)


def describe_mpt(reader: ModelReader, model: Any) -> Decoder:
    """Describe MPT."""
    body, layers = model.transformer, []
    for layer in body.blocks:
        attn, heads = layer.attn, layer.attn.n_heads
        qkv, output, scale = reader.linear(attn.Wqkv), reader.linear(attn.out_proj), float(attn.softmax_scale)
        attention = Attention(qkv, output, heads, heads, attn.head_dim, scale, clip=float(attn.clip_qkv or 0.0))
        mlp = MLP(reader.linear(layer.ffn.up_proj), reader.linear(layer.ffn.down_proj), "gelu")
        layers.append(Layer(reader.name(layer), attention, mlp, reader.norm(layer.norm_1), reader.norm(layer.norm_2)))
    alibi = -body.build_mpt_alibi_tensor(body.num_heads, 2)[:, 0, 0].numpy()  # at positions -1 and 0
    return assemble_decoder(reader, model, body.wte, layers, body.norm_f, alibi=alibi)
