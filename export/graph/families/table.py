"""The model families with a fused graph: how each transformers model becomes a `limbeck.export.graph.decoder.Decoder`.

A new family is one entry in FAMILIES, at the end. If no function of this folder fits it, write one that takes a
ModelReader and the model; a parameter that it does not read makes `decoder_from_model` fail, so nothing is lost
silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from limbeck.export.graph.decoder import Decoder
from limbeck.export.graph.families.gpt import describe_gpt2, describe_gpt_neox, describe_opt, describe_phi
from limbeck.export.graph.families.llama import describe_llama
from limbeck.export.graph.families.mixture import read_experts
from limbeck.export.graph.reader import ModelReader, UnsupportedModel


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


_gemma = partial(describe_llama, norm_weight_offset=1.0, scale_embedding=True)
_llama_with_window = partial(describe_llama, window_in_config=True)
_mixture = partial(describe_llama, read_mlp=read_experts)
_sigmoid_mixture = partial(describe_llama, read_mlp=partial(read_experts, sigmoid=True))

# `model_type` of transformers -> the family.
FAMILIES: dict[str, Family] = {
    "dots1": Family(_sigmoid_mixture),
    "flex_olmo": Family(_mixture),
    "gemma": Family(_gemma, "gemma"),
    "gemma2": Family(_gemma, "gemma2"),
    "gemma3_text": Family(_gemma, "gemma3_text"),
    "glm4_moe": Family(_sigmoid_mixture),
    "gpt2": Family(describe_gpt2),
    "gpt_neox": Family(describe_gpt_neox),
    "granite": Family(describe_llama, "granite"),
    "granitemoe": Family(_mixture),
    "granitemoeshared": Family(_mixture),
    "llama": Family(describe_llama, "llama"),
    "mellum": Family(_mixture),
    "minimax_m2": Family(_sigmoid_mixture),
    "mistral": Family(_llama_with_window, "mistral"),
    "mixtral": Family(partial(_mixture, window_in_config=True)),
    "olmo2": Family(describe_llama, "olmo"),
    "olmoe": Family(_mixture),
    "opt": Family(describe_opt),
    "phi": Family(describe_phi, "phi"),
    "phi3": Family(_llama_with_window, "phi3"),
    "qwen2": Family(describe_llama, "qwen2"),
    "qwen2_moe": Family(_mixture),
    "qwen3": Family(describe_llama, "qwen3"),
    "qwen3_moe": Family(_mixture),
    "smollm3": Family(describe_llama, "smollm3"),
    "solar_open": Family(_sigmoid_mixture),
    "stablelm": Family(describe_llama),
}
