"""Llama and the families built like it: a list of layers, each an attention and an MLP, with one norm or two around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from limbeck.export.graph.decoder import MLP, Attention, Decoder, Experts, Layer, Linear, Norm, Rotary
from limbeck.export.graph.families.parts import first_part, mlp_activation, rotary_positions
from limbeck.export.graph.reader import ModelReader, UnsupportedModel

# Attributes of a layer: its norms before attention, after attention, before the MLP and after it.
NormNames = tuple[str | None, str | None, str | None, str | None]
NORMS_BEFORE: NormNames = ("input_layernorm", None, "post_attention_layernorm", None)
NORMS_AFTER: NormNames = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
NORMS_AROUND: NormNames = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
ONE_NORM: NormNames = ("input_layernorm", None, "input_layernorm", None)

# (reader, layer, configuration, factor of the output) -> the MLP or the experts of the layer.
ReadMLP = Callable[[ModelReader, Any, Any, float], MLP | Experts]


def no_window(config: Any, index: int) -> int:
    """Each layer sees all positions, whatever the configuration says."""
    return -1


def same_window(config: Any, index: int) -> int:
    """Each layer sees the last `sliding_window` positions of the configuration, or all if that is None."""
    return -1 if config.sliding_window is None else int(config.sliding_window)


def layer_window(config: Any, index: int) -> int:
    """A layer sees the last `sliding_window` positions if its entry in `layer_types` says so, else all: -1."""
    layer_type = config.layer_types[index]
    if layer_type == "sliding_attention" and config.sliding_window:
        return int(config.sliding_window)
    if layer_type != "full_attention":
        raise UnsupportedModel(f"a layer of the type {layer_type!r}")
    return -1


def read_qkv(reader: ModelReader, module: Any) -> Linear:
    """Read the products that give queries, keys and values as one."""
    if hasattr(module, "qkv_proj"):
        return reader.linear(module.qkv_proj)
    return reader.concatenate_linears(f"{reader.name(module)}.qkv_proj", module.q_proj, module.k_proj, module.v_proj)


def read_gated_mlp(reader: ModelReader, layer: Any, config: Any, scale: float) -> MLP:
    """Read `layer.mlp`, which has a gate. Its output is multiplied by `scale`."""
    return gated_mlp(reader, layer.mlp, config, scale)


@dataclass(frozen=True)
class Style:
    """How a family differs from Llama. What no field names is Llama's, even if a configuration has a key for it.

    Attributes:
        norms: the norms of a layer.
        window: returns how many positions the layer of an index sees; -1 is all.
        rotary_module: (body of the model, configuration, layer's index) -> the rotary module of the layer, or None.
        has_rotary: returns whether an attention module rotates queries and keys.
        interleaved, norm_after_rotary: see Rotary and Attention.
        rotary_sign: -1 rotates the other way.
        parallel: attention and MLP read the same input, and their outputs are added to it.
        embedding_norm: the last norm is applied to the embedding too.
        multipliers: Granite's: `embedding_multiplier` and `residual_multiplier` of the configuration apply.
        logit_scale: returns the factor of the logits.
        logit_softcap: `final_logit_softcapping` of the configuration applies.
        score_softcap: `attn_logit_softcapping` of the configuration applies.
        clip: `clip_qkv` of the configuration applies.
        query_scale: returns the factors of the queries at each of this many positions, float32.
        read_qkv: reads the product of an attention module that gives queries, keys and values.
        read_mlp: reads a layer's MLP or experts.
        refused: keys of the configuration that the graph has no place for, unless they are false.
    """

    norms: NormNames = NORMS_BEFORE
    window: Callable[[Any, int], int] = no_window
    rotary_module: Callable[[Any, Any, int], Any] = lambda body, config, index: body.rotary_emb
    has_rotary: Callable[[Any], bool] = lambda attention: True
    interleaved: bool = False
    norm_after_rotary: bool = False
    rotary_sign: int = 1
    parallel: bool = False
    embedding_norm: bool = False
    multipliers: bool = False
    logit_scale: Callable[[Any], float] = lambda config: 1.0
    logit_softcap: bool = False
    score_softcap: bool = False
    clip: bool = False
    query_scale: Callable[[Any, int], np.ndarray] | None = None
    read_qkv: Callable[[ModelReader, Any], Linear] = read_qkv
    read_mlp: ReadMLP = read_gated_mlp
    refused: tuple[str, ...] = ()


LLAMA = Style()


def describe_llama(reader: ModelReader, model: Any, style: Style = LLAMA) -> Decoder:
    """Describe a model whose parts are named as Llama's and whose family differs from Llama by `style`."""
    config, body = model.config, model.model
    for key in style.refused:
        if getattr(config, key, None):
            raise UnsupportedModel(f"{key}={getattr(config, key)!r}")
    positions, limit = rotary_positions(config)
    rotaries: dict[Any, Rotary | None] = {(None, None): None}
    layers = []
    for index, layer in enumerate(body.layers):
        module = style.rotary_module(body, config, index)
        layer_type = config.layer_types[index] if isinstance(getattr(module, "rope_type", None), dict) else None
        if (module, layer_type) not in rotaries:
            table = reader.rotary(module, positions, layer_type, style.interleaved)
            rotaries[module, layer_type] = replace(table, sin=table.sin * np.float32(style.rotary_sign))
        rotary = rotaries[module, layer_type] if style.has_rotary(layer.self_attn) else None
        layers.append(_read_layer(reader, layer, config, style, rotary, style.window(config, index)))
    embedding = body.embed_tokens
    norm = reader.norm(first_part(body, "norm", "final_layernorm"), config.hidden_size)
    head, head_bias = reader.head(model, embedding)
    scale = float(config.embedding_multiplier) if style.multipliers else float(getattr(embedding, "embed_scale", 1.0))
    return Decoder(
        reader.name(embedding),
        reader.array(embedding.weight),
        layers,
        norm,
        head,
        embedding_scale=scale,
        embedding_norm=replace(norm, name=f"{norm.name}.embedding") if style.embedding_norm else None,
        head_bias=head_bias,
        logit_scale=style.logit_scale(config),
        logit_softcap=float(config.final_logit_softcapping or 0.0) if style.logit_softcap else 0.0,
        max_positions=limit,
    )


def _read_layer(
    reader: ModelReader, layer: Any, config: Any, style: Style, rotary: Rotary | None, window: int
) -> Layer:
    norms = read_norms(reader, layer, style.norms, config.hidden_size)
    factors = {"after_attention": 1.0, "after_mlp": 1.0}
    if style.multipliers:  # of what is added to the residual sum: it goes into the last weight before that
        factors = dict.fromkeys(factors, float(config.residual_multiplier))
        for place, factor in factors.items():
            norm = norms[place]
            if norm:
                norms[place] = replace(norm, weight=norm.weight * np.float32(factor))
                factors[place] = 1.0
    attention = read_attention(reader, layer.self_attn, config, style, rotary, factors["after_attention"])
    mlp = style.read_mlp(reader, layer, config, factors["after_mlp"])
    return Layer(reader.name(layer), replace(attention, window=window), mlp, **norms, parallel=style.parallel)


def read_attention(
    reader: ModelReader, module: Any, config: Any, style: Style, rotary: Rotary | None, scale: float
) -> Attention:
    """Read an attention module, whose output is multiplied by `scale`. It sees all positions."""
    positions, _ = rotary_positions(config)
    heads, size, qkv = config.num_attention_heads, module.head_dim, style.read_qkv(reader, module)
    return Attention(
        qkv=qkv,
        output=reader.linear(first_part(module, "o_proj", "out_proj", "dense"), scale),
        heads=heads,
        kv_heads=(qkv.weight.shape[1] // size - heads) // 2,
        head_size=size,
        scale=float(module.scaling),
        rotary=rotary,
        softcap=float(config.attn_logit_softcapping or 0.0) if style.score_softcap else 0.0,
        q_norm=_read_head_norm(reader, module, size, "q_norm", "q_layernorm", "query_layernorm"),
        k_norm=_read_head_norm(reader, module, size, "k_norm", "k_layernorm", "key_layernorm"),
        sinks=reader.array(module.sinks) if hasattr(module, "sinks") else None,
        norm_after_rotary=style.norm_after_rotary,
        query_scale=style.query_scale(config, positions) if style.query_scale else None,
        clip=float(config.clip_qkv or 0.0) if style.clip else 0.0,
    )


def _read_head_norm(reader: ModelReader, module: Any, head_size: int, *names: str) -> Norm | None:
    """Read the norm of queries or keys that has one of these names, or return None."""
    norm = first_part(module, *names)
    if norm is None:
        return None
    return reader.head_norms(norm.norms) if hasattr(norm, "norms") else reader.norm(norm, head_size)


def read_norms(reader: ModelReader, layer: Any, names: NormNames, size: int | None = None) -> dict[str, Any]:
    """Read a layer's norms. Returns fields of Layer, each a Norm or None; the same name twice is the same Norm."""
    modules = {name: first_part(layer, name) for name in names if name}
    norms = {name: None if module is None else reader.norm(module, size) for name, module in modules.items()}
    places = ("before_attention", "after_attention", "before_mlp", "after_mlp")
    return {place: norms[name] if name else None for place, name in zip(places, names, strict=True)}


def gated_mlp(reader: ModelReader, mlp: Any, config: Any, scale: float) -> MLP:
    """Read an MLP with a gate; Phi-3, GLM and Granite 4 store gate and up projection in one matrix."""
    activation = mlp_activation(mlp)
    down = reader.linear(first_part(mlp, "down_proj", "output_linear"), scale)
    packed = first_part(mlp, "gate_up_proj", "input_linear")
    if packed is None:
        return MLP(reader.linear(mlp.up_proj), down, activation, reader.linear(mlp.gate_proj))
    both = reader.linear(packed)
    gate, up = np.split(both.weight, 2, axis=1)
    gate_bias, up_bias = (None, None) if both.bias is None else np.split(both.bias, 2)
    name = reader.name(mlp)
    return MLP(Linear(f"{name}.up_proj", up, up_bias), down, activation, Linear(f"{name}.gate_proj", gate, gate_bias))


def ungated_mlp(up: str, down: str) -> ReadMLP:
    """Return a function that reads a layer's MLP without a gate, whose products have these names."""

    def read(reader: ModelReader, layer: Any, config: Any, scale: float) -> MLP:
        mlp = layer.mlp
        return MLP(reader.linear(getattr(mlp, up)), reader.linear(getattr(mlp, down), scale), mlp_activation(mlp))

    return read
