"""Llama and the families built like it: RMS norms, rotary embedding, a gated MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from limbeck.export.graph.decoder import MLP, Attention, Decoder, Experts, Layer, Linear, Norm, Rotary
from limbeck.export.graph.families.parts import activation_name
from limbeck.export.graph.reader import ModelReader, UnsupportedModel

# (reader, layer, configuration, factor of the output) -> the MLP or the experts of the layer.
ReadMLP = Callable[[ModelReader, Any, Any, float], MLP | Experts]


def describe_llama(
    reader: ModelReader,
    model: Any,
    *,
    norm_weight_offset: float = 0.0,
    scale_embedding: bool = False,
    window_in_config: bool = False,
    read_mlp: ReadMLP | None = None,
) -> Decoder:
    """Describe Llama and the families built like it. Parts that only some of them have are found by attribute.

    Args:
        norm_weight_offset: Gemma's norms multiply by 1 + weight.
        scale_embedding: Gemma multiplies the embedding by sqrt(hidden_size).
        window_in_config: every layer has the window of `config.sliding_window`, and the attention modules have none.
        read_mlp: reads a layer's MLP or experts; None: the MLP is `layer.mlp` and has a gate.
    """
    config, body = model.config, model.model
    read_mlp = read_mlp or _read_gated_mlp
    residual_scale = getattr(config, "residual_multiplier", 1.0)
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "clip_qkv", None):
        raise UnsupportedModel("attention that is not causal, or clipped")
    layers = []
    for index, layer in enumerate(body.layers):
        window = window_size(config if window_in_config else layer.self_attn)
        layer_type = config.layer_types[index] if getattr(config, "layer_types", None) else None
        rotary = reader.rotary(body.rotary_emb, config.max_position_embeddings, layer_type)
        attention = llama_attention(reader, layer, config, rotary, window, norm_weight_offset)
        norms = llama_norms(reader, layer, norm_weight_offset)
        parallel = getattr(config, "use_parallel_residual", False)
        if parallel:  # StableLM: attention and MLP read the same norm
            norms["before_mlp"] = norms["before_attention"]
        mlp = read_mlp(reader, layer, config, residual_scale)
        layers.append(Layer(reader.name(layer), attention, mlp, **norms, parallel=parallel))
    embedding = body.embed_tokens
    head, head_bias = reader.head(model, embedding)
    multiplier = math.sqrt(config.hidden_size) if scale_embedding else getattr(config, "embedding_multiplier", 1.0)
    return Decoder(
        reader.name(embedding),
        reader.array(embedding.weight),
        layers,
        reader.norm(body.norm, norm_weight_offset),
        head,
        embedding_scale=multiplier,
        head_bias=head_bias,
        logit_scale=1 / getattr(config, "logits_scaling", 1.0),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def window_size(owner: Any) -> int:
    """Return the `sliding_window` of a configuration or an attention module: positions that are seen; -1 is all."""
    window = getattr(owner, "sliding_window", None)
    return -1 if window is None else int(window)


def llama_attention(
    reader: ModelReader, layer: Any, config: Any, rotary: Rotary, window: int, norm_weight_offset: float
) -> Attention:
    module = layer.self_attn
    if hasattr(module, "qkv_proj"):
        qkv = reader.linear(module.qkv_proj)
    else:
        name = f"{reader.name(layer)}.self_attn.qkv_proj"
        qkv = reader.concatenate_linears(name, module.q_proj, module.k_proj, module.v_proj)

    def norm(name: str) -> Norm | None:
        return reader.norm(getattr(module, name), norm_weight_offset) if hasattr(module, name) else None

    return Attention(
        qkv=qkv,
        output=reader.linear(module.o_proj, getattr(config, "residual_multiplier", 1.0)),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=module.head_dim,
        scale=float(getattr(module, "scaling", module.head_dim**-0.5)),
        rotary=rotary if getattr(module, "use_rope", True) else None,  # SmolLM3: some layers have none
        window=window,
        softcap=float(getattr(module, "attn_logit_softcapping", None) or 0.0),
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
    )


def llama_norms(reader: ModelReader, layer: Any, weight_offset: float) -> dict[str, Norm | None]:
    """Read a layer's norms by place. Gemma 2 and OLMo 2 have norms after attention and MLP, OLMo 2 none before."""

    def norm(name: str) -> Norm | None:
        module = getattr(layer, name, None)
        return None if module is None else reader.norm(module, weight_offset)

    if hasattr(layer, "post_feedforward_layernorm"):
        return {
            "before_attention": norm("input_layernorm"),
            "after_attention": norm("post_attention_layernorm"),
            "before_mlp": norm("pre_feedforward_layernorm"),
            "after_mlp": norm("post_feedforward_layernorm"),
        }
    return {"before_attention": norm("input_layernorm"), "before_mlp": norm("post_attention_layernorm")}


def _read_gated_mlp(reader: ModelReader, layer: Any, config: Any, scale: float) -> MLP:
    return gated_mlp(reader, layer.mlp, config, scale)


def gated_mlp(reader: ModelReader, mlp: Any, config: Any, scale: float) -> MLP:
    """Read an MLP with a gate; Phi-3 stores gate and up projection in one matrix."""
    activation = activation_name(getattr(config, "hidden_activation", None) or config.hidden_act)
    down = reader.linear(mlp.down_proj, scale)
    if not hasattr(mlp, "gate_up_proj"):
        return MLP(reader.linear(mlp.up_proj), down, activation, reader.linear(mlp.gate_proj))
    both = reader.linear(mlp.gate_up_proj)
    gate, up = np.split(both.weight, 2, axis=1)
    name = both.name.removesuffix("gate_up_proj")
    return MLP(Linear(f"{name}up_proj", up), down, activation, Linear(f"{name}gate_proj", gate))
