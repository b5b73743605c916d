"""The model families with a fused graph: how each transformers model becomes a `limbeck.export.graph.decoder.Decoder`.

A new family is one entry in FAMILIES, at the end. If no function of this folder fits it, write one that takes a
ModelReader and the model; a parameter that it does not read makes `decoder_from_model` fail, so nothing is lost
silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from limbeck.export.graph.decoder import Attention, Decoder
from limbeck.export.graph.families.alibi import describe_bloom, describe_mpt
from limbeck.export.graph.families.gemma4 import describe_gemma4
from limbeck.export.graph.families.gpt import (
    describe_biogpt,
    describe_gpt2,
    describe_gpt_bigcode,
    describe_gpt_neo,
    describe_opt,
    describe_xglm,
)
from limbeck.export.graph.families.gpt_rotary import describe_falcon, describe_gpt_neox, describe_gptj
from limbeck.export.graph.families.hybrid import LFM2, QWEN35, describe_hybrid
from limbeck.export.graph.families.llama import (
    LLAMA,
    NORMS_AFTER,
    NORMS_BEFORE,
    Style,
    describe_llama,
    layer_window,
    same_window,
)
from limbeck.export.graph.families.mixture import read_clamped_experts, read_experts
from limbeck.export.graph.families.styles import (
    APERTUS,
    ARCEE,
    COHERE,
    COHERE2,
    EXAONE4,
    GEMMA2,
    GEMMA3,
    GLM4,
    GRANITE,
    GRANITE4,
    GRANITE_SWA,
    HUNYUAN,
    HYPERCLOVAX,
    INTERLEAVED,
    LAYER_WINDOW,
    MINISTRAL3,
    NANOCHAT,
    OLMO,
    OLMO2,
    OLMO3,
    PERSIMMON,
    PHI,
    SAME_WINDOW,
    SMOLLM3,
    STARCODER2,
    VAULTGEMMA,
    describe_stablelm,
)
from limbeck.export.graph.reader import ModelReader, UnsupportedModel

HEAD_SIZE_FACTOR = 8  # GroupQueryAttention takes multiples of it


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

    Raises UnsupportedModel if its family is not in FAMILIES, if it has a part that its family usually lacks, or lacks
    one that its family has, or if onnxruntime's operators do not take its sizes.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise UnsupportedModel(f"no description of the architecture {model.config.model_type!r}")
    reader = ModelReader(model)
    try:
        decoder = family.describe(reader, model)
    except (AttributeError, KeyError) as error:  # a model of another version, or with code of its own
        raise UnsupportedModel(f"this {model.config.model_type!r} is not as transformers has it: {error}") from error
    unread = sorted(reader.unread_parameters())
    if unread:
        raise UnsupportedModel(f"no place for {unread[0]}")
    for layer in decoder.layers:
        size = layer.attention.head_size if isinstance(layer.attention, Attention) else 0
        if size % HEAD_SIZE_FACTOR:
            raise UnsupportedModel(f"a head size of {size}: onnxruntime takes multiples of {HEAD_SIZE_FACTOR}")
    return decoder


def _like_llama(style: Style = LLAMA, genai_type: str | None = None) -> Family:
    return Family(partial(describe_llama, style=style), genai_type)


_EXPERTS = Style(read_mlp=read_experts)
_SIGMOID_EXPERTS = Style(read_mlp=partial(read_experts, sigmoid=True))
_GRANITE_EXPERTS = replace(GRANITE, read_mlp=read_experts)

# `model_type` of transformers -> the family.
FAMILIES: dict[str, Family] = {
    "apertus": _like_llama(APERTUS),
    "apertus1p5_text": _like_llama(APERTUS),
    "arcee": _like_llama(ARCEE),
    "biogpt": Family(describe_biogpt),
    "bloom": Family(describe_bloom),
    "codegen": Family(describe_gptj),
    "cohere": _like_llama(COHERE),
    "cohere2": _like_llama(COHERE2),
    "cwm": _like_llama(LAYER_WINDOW),
    "dots1": _like_llama(replace(_SIGMOID_EXPERTS, window=layer_window)),
    "ernie4_5": _like_llama(INTERLEAVED, "ernie4_5"),
    "ernie4_5_moe": _like_llama(replace(INTERLEAVED, read_mlp=read_experts)),
    "exaone": _like_llama(LLAMA, "llama"),
    "exaone4": _like_llama(EXAONE4),
    "exaone_moe": _like_llama(replace(EXAONE4, norms=NORMS_BEFORE, read_mlp=_SIGMOID_EXPERTS.read_mlp)),
    "falcon": Family(describe_falcon),
    "flex_olmo": _like_llama(replace(_EXPERTS, norms=NORMS_AFTER)),
    "gemma": _like_llama(LLAMA, "gemma"),
    "gemma2": _like_llama(GEMMA2, "gemma2"),
    "gemma3_text": _like_llama(GEMMA3, "gemma3_text"),
    "gemma4_text": Family(describe_gemma4),
    "glm": _like_llama(INTERLEAVED),
    "glm4": _like_llama(GLM4),
    "glm4_moe": _like_llama(_SIGMOID_EXPERTS),
    "gpt2": Family(describe_gpt2),
    "gpt_bigcode": Family(describe_gpt_bigcode),
    "gpt_neo": Family(describe_gpt_neo),
    "gpt_neox": Family(describe_gpt_neox),
    "gptj": Family(describe_gptj),
    "gpt_oss": _like_llama(Style(read_mlp=read_clamped_experts, window=layer_window)),
    "granite": _like_llama(GRANITE, "granite"),
    "granite_swa": _like_llama(GRANITE_SWA),
    "granitemoe": _like_llama(_GRANITE_EXPERTS),
    "granitemoe_swa": _like_llama(replace(GRANITE_SWA, read_mlp=read_experts)),
    "granitemoehybrid": _like_llama(GRANITE4),
    "granitemoeshared": _like_llama(_GRANITE_EXPERTS),
    "helium": _like_llama(INTERLEAVED),
    "hunyuan_v1_dense": _like_llama(HUNYUAN, "hunyuandensev1"),
    "hunyuan_v1_moe": _like_llama(replace(HUNYUAN, read_mlp=read_experts)),
    "hyperclovax": _like_llama(HYPERCLOVAX),
    "internlm3": _like_llama(LLAMA, "llama"),
    "iquestcoder": _like_llama(LLAMA, "llama"),
    "jais2": _like_llama(ARCEE),
    "lfm2": Family(partial(describe_hybrid, hybrid=LFM2)),
    "lfm2_moe": Family(partial(describe_hybrid, hybrid=LFM2)),
    "llama": _like_llama(LLAMA, "llama"),
    "mellum": _like_llama(replace(_EXPERTS, window=layer_window)),
    "minimax_m2": _like_llama(_SIGMOID_EXPERTS),
    "ministral": _like_llama(LAYER_WINDOW, "mistral"),
    "ministral3": _like_llama(MINISTRAL3, "mistral"),
    "mistral": _like_llama(SAME_WINDOW, "mistral"),
    "mixtral": _like_llama(replace(_EXPERTS, window=same_window)),
    "mpt": Family(describe_mpt),
    "nanochat": _like_llama(NANOCHAT),
    "nemotron": _like_llama(ARCEE, "nemotron"),
    "olmo": _like_llama(OLMO, "olmo"),
    "olmo2": _like_llama(OLMO2, "olmo"),
    "olmo3": _like_llama(OLMO3, "olmo"),
    "olmoe": _like_llama(replace(_EXPERTS, refused=("clip_qkv",))),
    "opt": Family(describe_opt),
    "persimmon": _like_llama(PERSIMMON),
    "phi": _like_llama(PHI, "phi"),
    "phi3": _like_llama(SAME_WINDOW, "phi3"),
    "qwen2": _like_llama(LAYER_WINDOW, "qwen2"),
    "qwen2_moe": _like_llama(replace(_EXPERTS, window=layer_window)),
    "qwen3": _like_llama(LAYER_WINDOW, "qwen3"),
    "qwen3_moe": _like_llama(replace(_EXPERTS, window=same_window)),
    "qwen3_5_moe_text": Family(partial(describe_hybrid, hybrid=QWEN35)),
    "qwen3_5_text": Family(partial(describe_hybrid, hybrid=QWEN35)),
    "sarvam_moe": _like_llama(_SIGMOID_EXPERTS),
    "seed_oss": _like_llama(),
    "smollm3": _like_llama(SMOLLM3, "smollm3"),
    "solar_open": _like_llama(_SIGMOID_EXPERTS),
    "stablelm": Family(describe_stablelm),
    "starcoder2": _like_llama(STARCODER2),
    "vaultgemma": _like_llama(VAULTGEMMA),
    "xglm": Family(describe_xglm),
}
