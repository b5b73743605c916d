"""How the families that are built like Llama differ from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from limbeck.export.graph.decoder import MLP, XIELU, Decoder, Experts, Linear
from limbeck.export.graph.families.llama import (
    LLAMA,
    NORMS_AFTER,
    NORMS_AROUND,
    ONE_NORM,
    Style,
    describe_llama,
    gated_mlp,
    layer_window,
    same_window,
    ungated_mlp,
)
from limbeck.export.graph.families.mixture import read_experts
from limbeck.export.graph.families.parts import reorder_qkv
from limbeck.export.graph.reader import ModelReader


def _scale_queries_by_position(config: Any, positions: int) -> np.ndarray:
    """Return Ministral 3's factors of queries, (positions,) float32."""
    import torch

    rope = config.rope_parameters
    steps = torch.floor(torch.arange(positions) / rope["original_max_position_embeddings"])
    return (1 + rope["llama_4_scaling_beta"] * torch.log(1 + steps)).numpy()


def _read_xielu_mlp(reader: ModelReader, layer: Any, config: Any, scale: float) -> MLP | Experts:
    import torch

    if config.hidden_act != "xielu":
        return ungated_mlp("up_proj", "down_proj")(reader, layer, config, scale)
    mlp, module = layer.mlp, layer.mlp.act_fn
    beta = float(reader.array(module.beta))
    positive, negative = (
        float(torch.nn.functional.softplus(torch.from_numpy(reader.array(alpha))))
        for alpha in (module.alpha_p, module.alpha_n)
    )
    xielu = XIELU(positive, beta + negative, beta, float(reader.array(module.eps)))
    return MLP(reader.linear(mlp.up_proj), reader.linear(mlp.down_proj, scale), xielu)


def _read_qkv_by_head(reader: ModelReader, module: Any) -> Linear:
    return reorder_qkv(reader.linear(module.query_key_value), module.num_heads, module.head_dim)


def _read_granite4_mlp(reader: ModelReader, layer: Any, config: Any, scale: float) -> MLP | Experts:
    if layer.block_sparse_moe is not None:
        return read_experts(reader, layer, config, scale)
    return gated_mlp(reader, layer.shared_mlp, config, scale)


def _granite_swa_rotary(body: Any, config: Any, index: int) -> Any:
    """Return the rotary module of the layer's theta, or None if that is 0."""
    theta = config.layer_rope_theta[index]
    return next((module for module in body.rotary_embs if module.config.rope_parameters["rope_theta"] == theta), None)


APERTUS = Style(norms=("attention_layernorm", None, "feedforward_layernorm", None), read_mlp=_read_xielu_mlp)
ARCEE = Style(read_mlp=ungated_mlp("up_proj", "down_proj"))
COHERE = Style(norms=ONE_NORM, parallel=True, interleaved=True, logit_scale=lambda config: float(config.logit_scale))
COHERE2 = replace(COHERE, window=layer_window, has_rotary=lambda module: module.sliding_window is not None)
EXAONE4 = Style(
    norms=NORMS_AFTER,
    window=layer_window,
    has_rotary=lambda module: module.sliding_window is None or module.is_sliding,
)
GEMMA3 = Style(norms=NORMS_AROUND, window=layer_window, logit_softcap=True, refused=("use_bidirectional_attention",))
GEMMA2 = replace(GEMMA3, score_softcap=True)
GLM4 = Style(
    norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    interleaved=True,
)
GRANITE = Style(multipliers=True, logit_scale=lambda config: 1 / config.logits_scaling)
GRANITE4 = replace(GRANITE, window=layer_window, read_mlp=_read_granite4_mlp)
GRANITE_SWA = replace(GRANITE, window=layer_window, rotary_module=_granite_swa_rotary)
HUNYUAN = Style(norm_after_rotary=True)
HYPERCLOVAX = Style(
    norms=("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
    multipliers=True,
    logit_scale=lambda config: float(config.logits_scaling),
)
INTERLEAVED = Style(interleaved=True)
LAYER_WINDOW = Style(window=layer_window)
MINISTRAL3 = Style(window=same_window, query_scale=_scale_queries_by_position)
NANOCHAT = Style(
    norm_after_rotary=True,
    rotary_sign=-1,
    embedding_norm=True,
    logit_softcap=True,
    read_mlp=ungated_mlp("fc1", "fc2"),
)
OLMO = Style(clip=True)
OLMO2 = Style(norms=NORMS_AFTER)
OLMO3 = replace(OLMO2, window=layer_window)
PERSIMMON = Style(read_qkv=_read_qkv_by_head, read_mlp=ungated_mlp("dense_h_to_4h", "dense_4h_to_h"))
PHI = Style(norms=ONE_NORM, parallel=True, read_mlp=ungated_mlp("fc1", "fc2"))
SAME_WINDOW = Style(window=same_window)
SMOLLM3 = Style(window=layer_window, has_rotary=lambda module: bool(module.use_rope))
STARCODER2 = Style(window=same_window, read_mlp=ungated_mlp("c_fc", "c_proj"))
VAULTGEMMA = replace(GEMMA2, norms=("input_layernorm", None, "pre_feedforward_layernorm", None))


def describe_stablelm(reader: ModelReader, model: Any) -> Decoder:
    """Describe StableLM, whose configuration says whether attention and MLP read the same input."""
    style = Style(norms=ONE_NORM, parallel=True) if model.config.use_parallel_residual else LLAMA
    return describe_llama(reader, model, style)
