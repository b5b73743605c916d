"""What kind of model a config.json describes. Limbeck takes causal (decoder-only) language models."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from limbeck.registry.core.errors import BadInput

CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "WithLMHeadModel")
HEADS = {
    "ForSequenceClassification": "a classifier or reward model",
    "ForTokenClassification": "a token classifier",
    "ForQuestionAnswering": "a model for extractive question answering",
    "ForMultipleChoice": "a model for multiple choice",
    "RewardModel": "a reward model",
    "ForRewardModel": "a reward model",
}
OTHER_INPUTS = {"vision_config": "vision", "audio_config": "audio", "speech_config": "audio"}
# AutoModelForCausalLM loads the language model alone and exactly: tried on models with random weights.
TEXT_PART_LOADS = ("qwen3_5", "qwen3_5_moe")
FLOAT_FIX = "give the unquantized model"
# Weights that transformers turns into floats on any processor.
DEQUANTIZED = ("mxfp4", "fp8")


def refuse_other_kinds(config: dict[str, Any], name: str) -> None:
    """Refuse the config.json of anything but a causal language model with float weights.

    Args:
        config: the content of config.json.
        name: what messages call the model.

    Raises BadInput that names the kind. A type that is not known passes: transformers reports it.
    """
    model_type = str(config.get("model_type", "model"))
    architectures = [str(each) for each in config.get("architectures") or []]
    kind = None
    if not _has_causal_code(config):
        kind = _kind_of_architecture(config, model_type, architectures)
    if kind is not None:
        stated = f" ({', '.join(architectures)})" if architectures else ""
        raise BadInput(
            f"{name}: {model_type}{stated} is {kind}: Limbeck takes causal (decoder-only) language models",
            fix="save its language model on its own and give that folder" if has_other_inputs(config) else None,
        )
    method = quantization_method(config)
    if method is not None and method not in DEQUANTIZED:
        raise BadInput(f"{name} is a quantized checkpoint ({method})", fix=FLOAT_FIX)


def quantization_method(config: dict[str, Any]) -> str | None:
    """How the weights are quantized, such as "gptq" or "fp8"; None if they are floats."""
    stated = config.get("quantization_config") or config.get("compression_config")
    if not stated:
        return None
    if not isinstance(stated, dict):
        return "of an unknown method"
    method = stated.get("quant_method")
    if method:
        return str(method)
    if stated.get("load_in_4bit") or stated.get("load_in_8bit"):
        return "bitsandbytes"
    return "of an unknown method"


def has_other_inputs(config: dict[str, Any]) -> bool:
    """Whether the model takes images or sound beside text."""
    return any(isinstance(config.get(key), dict) for key in OTHER_INPUTS)


def _has_causal_code(config: dict[str, Any]) -> bool:
    """Whether the folder brings its own code for a causal language model."""
    auto_map = config.get("auto_map")
    return isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map


def _kind_of_architecture(config: dict[str, Any], model_type: str, architectures: list[str]) -> str | None:
    """What the model is, if it is not a causal language model."""
    if config.get("is_encoder_decoder") is True and not any(map(_is_causal, architectures)):
        return "an encoder-decoder"
    for architecture in architectures:
        for ending, kind in HEADS.items():
            if architecture.endswith(ending):
                return kind
    if has_other_inputs(config) and model_type not in TEXT_PART_LOADS:
        inputs = sorted({other for key, other in OTHER_INPUTS.items() if isinstance(config.get(key), dict)})
        return f"a multimodal model (text, {', '.join(inputs)})"
    if any(map(_is_causal, architectures)):
        return None
    return _kind_of_type(model_type, architectures)


def _is_causal(architecture: str) -> bool:
    return architecture.endswith(CAUSAL_ENDINGS)


def _kind_of_type(model_type: str, architectures: list[str]) -> str | None:
    """What transformers takes a type for, if it has no causal language model of it; None if it does not know."""
    from transformers.models.auto import modeling_auto as auto

    if any(architecture.endswith(("ForMaskedLM", "ForPreTraining")) for architecture in architectures):
        return "an encoder"
    if set(architectures) & set(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()):
        return None if model_type in TEXT_PART_LOADS else "a vision-language model"
    if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (
        model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and architectures
    ):
        return None
    tables: dict[str, tuple[Container[str], ...]] = {
        "an encoder-decoder": (
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        ),
        "a vision-language model": (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,),
        "an encoder": (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES),
        "not a language model": (auto.MODEL_MAPPING_NAMES,),
    }
    return next((kind for kind, found in tables.items() if any(model_type in table for table in found)), None)
