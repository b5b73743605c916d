"""The model families with a fused graph: how each transformers model becomes a `limbeck.export.graph.decoder.Decoder`.

A new family is one entry in FAMILIES, at the end. If no function here fits it, write one that takes a ModelReader and
the model; a parameter that it does not read makes `decoder_from_model` fail, so nothing is lost silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from limbeck.export.graph.decoder import MLP, Attention, Decoder, Layer, Linear, Norm, Rotary
from limbeck.export.graph.reader import ModelReader, UnsupportedModel

# transformers' names of activations -> those of limbeck.export.graph.decoder.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        describe: turns a float32 transformers model into a Decoder. Raises UnsupportedModel.
        genai_type: `type` of the family in onnxruntime-genai's genai_config.json; None if it does not run the family.
    """

    describe: Callable[[ModelReader, Any], Decoder]
    genai_type: str | None = None


def decoder_from_model(model: Any) -> Decoder:
    """Describe `model`, a transformers causal language model in float32.

    Raises UnsupportedModel if its family is not in FAMILIES, or if it has a part that its family usually lacks.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise UnsupportedModel(f"no description of the architecture {model.config.model_type!r}")
    reader = ModelReader(model)
    decoder = family.describe(reader, model)
    unread = sorted(reader.unread_parameters())
    if unread:
        raise UnsupportedModel(f"no place for {unread[0]}")
    return decoder


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {name!r}")
    return ACTIVATIONS[name]


def _llama(
    reader: ModelReader,
    model: Any,
    *,
    norm_weight_offset: float = 0.0,
    scale_embedding: bool = False,
    window_in_config: bool = False,
) -> Decoder:
    """Describe Llama and the families built like it. Parts that only some of them have are found by attribute.

    Args:
        norm_weight_offset: Gemma's norms multiply by 1 + weight.
        scale_embedding: Gemma multiplies the embedding by sqrt(hidden_size).
        window_in_config: every layer has the window of `config.sliding_window`, and the attention modules have none.
    """
    config, body = model.config, model.model
    residual_scale = getattr(config, "residual_multiplier", 1.0)
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "clip_qkv", None):
        raise UnsupportedModel("attention that is not causal, or clipped")
    global_rotary = reader.rotary(body.rotary_emb, config.max_position_embeddings)
    local = getattr(body, "rotary_emb_local", None)
    local_rotary = global_rotary if local is None else reader.rotary(local, config.max_position_embeddings)
    layers = []
    for layer in body.layers:
        window = _window(config if window_in_config else layer.self_attn)
        attention = _llama_attention(
            reader, layer, config, local_rotary if window > 0 else global_rotary, window, norm_weight_offset
        )
        norms = _llama_norms(reader, layer, norm_weight_offset)
        parallel = getattr(config, "use_parallel_residual", False)
        if parallel:  # StableLM: attention and MLP read the same norm
            norms["before_mlp"] = norms["before_attention"]
        mlp = _gated_mlp(reader, layer.mlp, config, residual_scale)
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


def _window(owner: Any) -> int:
    """Return the `sliding_window` of a configuration or an attention module: positions that are seen; -1 is all."""
    window = getattr(owner, "sliding_window", None)
    return -1 if window is None else int(window)


def _llama_attention(
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


def _llama_norms(reader: ModelReader, layer: Any, weight_offset: float) -> dict[str, Norm | None]:
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


def _gated_mlp(reader: ModelReader, mlp: Any, config: Any, scale: float) -> MLP:
    """Read an MLP with a gate; Phi-3 stores gate and up projection in one matrix."""
    activation = _activation(getattr(config, "hidden_activation", None) or config.hidden_act)
    down = reader.linear(mlp.down_proj, scale)
    if not hasattr(mlp, "gate_up_proj"):
        return MLP(reader.linear(mlp.up_proj), down, activation, reader.linear(mlp.gate_proj))
    both = reader.linear(mlp.gate_up_proj)
    gate, up = np.split(both.weight, 2, axis=1)
    name = both.name.removesuffix("gate_up_proj")
    return MLP(Linear(f"{name}up_proj", up), down, activation, Linear(f"{name}gate_proj", gate))


def _gpt2(reader: ModelReader, model: Any) -> Decoder:
    config, body = model.config, model.transformer
    heads, size = config.n_head, config.n_embd // config.n_head
    layers = []
    for index, layer in enumerate(body.h):
        scale = size**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        qkv, output = reader.linear(layer.attn.c_attn), reader.linear(layer.attn.c_proj)
        attention = Attention(qkv, output, heads, heads, size, scale)
        activation = _activation(config.activation_function)
        mlp = MLP(reader.linear(layer.mlp.c_fc), reader.linear(layer.mlp.c_proj), activation)
        norms = (reader.layer_norm(layer.ln_1), reader.layer_norm(layer.ln_2))
        layers.append(Layer(reader.name(layer), attention, mlp, *norms))
    return _with_head(reader, model, body.wte, layers, body.ln_f, positions=reader.array(body.wpe.weight))


def _opt(reader: ModelReader, model: Any) -> Decoder:
    config, body = model.config, model.model.decoder
    if not config.do_layer_norm_before or body.final_layer_norm is None:
        raise UnsupportedModel("norms after each part only")
    layers = []
    for layer in body.layers:
        name, attn = reader.name(layer), layer.self_attn
        qkv = reader.concatenate_linears(f"{name}.self_attn.qkv_proj", attn.q_proj, attn.k_proj, attn.v_proj)
        heads = attn.num_heads
        attention = Attention(qkv, reader.linear(attn.out_proj), heads, heads, attn.head_dim, float(attn.scaling))
        mlp = MLP(reader.linear(layer.fc1), reader.linear(layer.fc2), _activation(config.activation_function))
        norms = (reader.layer_norm(layer.self_attn_layer_norm), reader.layer_norm(layer.final_layer_norm))
        layers.append(Layer(name, attention, mlp, *norms))
    positions = body.embed_positions
    return _with_head(
        reader,
        model,
        body.embed_tokens,
        layers,
        body.final_layer_norm,
        positions=reader.array(positions.weight),
        first_position=positions.offset,
    )


def _gpt_neox(reader: ModelReader, model: Any) -> Decoder:
    config, body = model.config, model.gpt_neox
    heads = config.num_attention_heads
    rotary = reader.rotary(body.rotary_emb, config.max_position_embeddings)
    layers = []
    for layer in body.layers:
        attn, size = layer.attention, layer.attention.head_size
        qkv = _reorder_qkv(reader.linear(attn.query_key_value), heads, size)
        attention = Attention(qkv, reader.linear(attn.dense), heads, heads, size, float(attn.scaling), rotary)
        up, down = reader.linear(layer.mlp.dense_h_to_4h), reader.linear(layer.mlp.dense_4h_to_h)
        mlp = MLP(up, down, _activation(config.hidden_act))
        norms = (reader.layer_norm(layer.input_layernorm), reader.layer_norm(layer.post_attention_layernorm))
        layers.append(Layer(reader.name(layer), attention, mlp, *norms, parallel=config.use_parallel_residual))
    return _with_head(reader, model, body.embed_in, layers, body.final_layer_norm)


def _reorder_qkv(linear: Linear, heads: int, size: int) -> Linear:
    """Reorder GPT-NeoX's columns (query, key, value of head 0, then of head 1, ...) to all queries, keys, values."""
    order = np.arange(3 * heads * size).reshape(heads, 3, size).transpose(1, 0, 2).ravel()
    return Linear(linear.name, linear.weight[:, order], None if linear.bias is None else linear.bias[order])


def _phi(reader: ModelReader, model: Any) -> Decoder:
    config, body = model.config, model.model
    rotary = reader.rotary(body.rotary_emb, config.max_position_embeddings)
    layers = []
    for layer in body.layers:
        name, attn = reader.name(layer), layer.self_attn
        attention = Attention(
            reader.concatenate_linears(f"{name}.self_attn.qkv_proj", attn.q_proj, attn.k_proj, attn.v_proj),
            reader.linear(attn.dense),
            config.num_attention_heads,
            config.num_key_value_heads,
            attn.head_dim,
            float(attn.scaling),
            rotary,
        )
        mlp = MLP(reader.linear(layer.mlp.fc1), reader.linear(layer.mlp.fc2), _activation(config.hidden_act))
        norm = reader.layer_norm(layer.input_layernorm)
        layers.append(Layer(name, attention, mlp, norm, norm, parallel=True))
    return _with_head(reader, model, body.embed_tokens, layers, body.final_layernorm)


def _with_head(
    reader: ModelReader, model: Any, embedding: Any, layers: list[Layer], norm: Any, **positions: Any
) -> Decoder:
    """Put a decoder together from its layers, embedding, last norm and head."""
    head, head_bias = reader.head(model, embedding)
    table = reader.array(embedding.weight)
    return Decoder(reader.name(embedding), table, layers, reader.norm(norm), head, head_bias=head_bias, **positions)


_gemma = partial(_llama, norm_weight_offset=1.0, scale_embedding=True)
_llama_with_window = partial(_llama, window_in_config=True)

# `model_type` of transformers -> the family.
FAMILIES: dict[str, Family] = {
    "gemma": Family(_gemma, "gemma"),
    "gemma2": Family(_gemma, "gemma2"),
    "gemma3_text": Family(_gemma, "gemma3_text"),
    "gpt2": Family(_gpt2),
    "gpt_neox": Family(_gpt_neox),
    "granite": Family(_llama, "granite"),
    "llama": Family(_llama, "llama"),
    "mistral": Family(_llama_with_window, "mistral"),
    "olmo2": Family(_llama, "olmo"),
    "opt": Family(_opt),
    "phi": Family(_phi, "phi"),
    "phi3": Family(_llama_with_window, "phi3"),
    "qwen2": Family(_llama, "qwen2"),
    "qwen3": Family(_llama, "qwen3"),
    "smollm3": Family(_llama, "smollm3"),
    "stablelm": Family(_llama),
}
