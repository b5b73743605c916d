"""Gemma 4 (text): inputs of the token at each layer, keys and values of earlier layers, heads of several sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from limbeck.export.graph.decoder import Attention, Decoder, Layer, TokenInput, TokenInputs
from limbeck.export.graph.families.llama import NORMS_AROUND, gated_mlp, layer_window, read_norms
from limbeck.export.graph.families.parts import read_activation
from limbeck.export.graph.reader import ModelReader, UnsupportedModel


def describe_gemma4(reader: ModelReader, model: Any) -> Decoder:
    """Describe Gemma 4's text model. Raises UnsupportedModel for the one with experts."""
    config, body = model.config, model.model
    if config.enable_moe_block:
        raise UnsupportedModel("experts with the activation gelu: onnxruntime's CPU has silu only")
    if config.use_bidirectional_attention == "all":
        raise UnsupportedModel("attention that is not causal")
    modes, layers = config.kv_sharing_modes, []
    for index, layer in enumerate(body.layers):
        source = None
        if modes[index] == "reuse":
            same_type = [n for n, kind in enumerate(config.layer_types) if kind == config.layer_types[index]]
            source = max(n for n in same_type if modes[n] != "reuse")
        layers.append(
            Layer(
                reader.name(layer),
                _attention(reader, layer.self_attn, body, config, source),
                gated_mlp(reader, layer.mlp, config, 1.0),
                **read_norms(reader, layer, NORMS_AROUND),
                token_input=_token_input(reader, layer, config) if config.hidden_size_per_layer_input else None,
                scale=float(reader.array(layer.layer_scalar)[0]),
            )
        )
    head, head_bias = reader.head(model, body.embed_tokens)
    return Decoder(
        reader.name(body.embed_tokens),
        reader.array(body.embed_tokens.weight),
        layers,
        reader.norm(body.norm),
        head,
        embedding_scale=math.sqrt(config.hidden_size),
        head_bias=head_bias,
        logit_softcap=float(config.final_logit_softcapping or 0.0),
        token_inputs=_token_inputs(reader, body, config) if config.hidden_size_per_layer_input else None,
    )


def _attention(reader: ModelReader, module: Any, body: Any, config: Any, source: int | None) -> Attention:
    """Describe the attention of one layer, which reads the keys and values of layer `source` if it is not None."""
    heads, size = config.num_attention_heads, module.head_dim
    linears = [module.q_proj]
    if source is None:  # without a projection of their own, the values are the keys before their norm
        linears += [module.k_proj, module.v_proj or module.k_proj]
    return Attention(
        qkv=reader.concatenate_linears(f"{reader.name(module)}.qkv_proj", *linears),
        output=reader.linear(module.o_proj),
        heads=heads,
        kv_heads=heads // module.num_key_value_groups,
        head_size=size,
        scale=float(module.scaling),
        rotary=reader.rotary(body.rotary_emb, config.max_position_embeddings, module.layer_type),
        window=layer_window(config, module.layer_idx),
        q_norm=reader.norm(module.q_norm),
        k_norm=reader.norm(module.k_norm) if source is None else None,
        v_norm=reader.norm(module.v_norm, size) if source is None else None,
        kv_layer=source,
    )


def _token_input(reader: ModelReader, layer: Any, config: Any) -> TokenInput:
    return TokenInput(
        reader.linear(layer.per_layer_input_gate),
        reader.linear(layer.per_layer_projection),
        reader.norm(layer.post_per_layer_input_norm),
        read_activation(layer.act_fn),
    )


def _token_inputs(reader: ModelReader, body: Any, config: Any) -> TokenInputs:
    """Read what all layers share. The sum of both parts is multiplied by sqrt(1/2): here, each of them is."""
    half = math.sqrt(0.5)
    norm = reader.norm(body.per_layer_projection_norm)
    return TokenInputs(
        reader.name(body.embed_tokens_per_layer),
        reader.array(body.embed_tokens_per_layer.weight),
        math.sqrt(config.hidden_size_per_layer_input) * half,
        reader.linear(body.per_layer_model_projection, config.hidden_size**-0.5),
        dataclasses.replace(norm, weight=norm.weight * np.float32(half)),
    )
