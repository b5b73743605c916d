"""Causal language models pass; every other kind of model is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.registry.checkpoints.kinds import quantization_method, refuse_other_kinds
from limbeck.registry.core.errors import BadInput

VISION = {"vision_config": {"hidden_size": 8}, "text_config": {"hidden_size": 8}}


def config_of(model_type: str, *architectures: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": list(architectures)} | fields


@pytest.mark.parametrize(
    "config",
    [
        config_of("llama", "LlamaForCausalLM"),
        config_of("llama"),
        config_of("gpt2", "GPT2LMHeadModel"),
        config_of("gpt2", "GPT2Model"),
        config_of("openai-gpt", "OpenAIGPTLMHeadModel"),
        config_of("mamba", "MambaForCausalLM"),
        config_of("bart", "BartForCausalLM", is_decoder=True),
        config_of("bert", "BertLMHeadModel", is_decoder=True),
        config_of("gemma3_text", "Gemma3ForCausalLM"),
        config_of("qwen3_5", "Qwen3_5ForConditionalGeneration", **VISION),
        config_of("not_in_transformers", "FooForCausalLM"),
        config_of("not_in_transformers", "Foo"),
        config_of("chatglm", "ChatGLMModel", auto_map={"AutoModelForCausalLM": "modeling.ChatGLM"}),
        config_of("t5", "T5ForCausal", auto_map={"AutoModelForCausalLM": "modeling.T5"}, is_encoder_decoder=True),
        {},
    ],
    ids=str,
)
def test_causal_language_models_pass(config: dict[str, Any]) -> None:
    refuse_other_kinds(config, "x")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (config_of("t5", "T5ForConditionalGeneration", is_encoder_decoder=True), "an encoder-decoder"),
        (config_of("t5gemma", "T5GemmaForConditionalGeneration"), "an encoder-decoder"),
        (config_of("bart", "BartForConditionalGeneration", is_encoder_decoder=True), "an encoder-decoder"),
        (config_of("whisper", "WhisperForConditionalGeneration", is_encoder_decoder=True), "an encoder-decoder"),
        (config_of("llava", "LlavaForConditionalGeneration", **VISION), r"a multimodal model \(text, vision\)"),
        (config_of("qwen2_vl", "Qwen2VLForConditionalGeneration"), "a vision-language model"),
        (config_of("gemma3", "Gemma3ForConditionalGeneration", **VISION), r"a multimodal model \(text, vision\)"),
        (config_of("gemma3", "Gemma3ForConditionalGeneration"), "a vision-language model"),
        (config_of("qwen2_audio", "Qwen2AudioForConditionalGeneration", audio_config={}), r".* \(text, audio\)"),
        (config_of("bert", "BertForMaskedLM"), "an encoder"),
        (config_of("bert", "BertModel"), "an encoder"),
        (config_of("electra", "ElectraForPreTraining"), "an encoder"),
        (config_of("llama", "LlamaForSequenceClassification"), "a classifier or reward model"),
        (config_of("bert", "BertForTokenClassification"), "a token classifier"),
        (config_of("gpt_neox_reward", "GPTNeoXRewardModel"), "a reward model"),
        (config_of("clip", "CLIPModel"), "not a language model"),
        (config_of("vit", "ViTForImageClassification"), "not a language model"),
    ],
    ids=str,
)
def test_other_kinds_are_refused_by_name(config: dict[str, Any], kind: str) -> None:
    name = rf"FOLDER: {config['model_type']} \({config['architectures'][0]}\) is {kind}: Limbeck takes causal"
    with pytest.raises(BadInput, match=name):
        refuse_other_kinds(config, "FOLDER")


@pytest.mark.parametrize(
    ("stated", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"bits": 3}}, "of an unknown method"),
    ],
)
def test_quantized_checkpoints_are_refused_by_method(stated: dict[str, Any], method: str) -> None:
    config = config_of("llama", "LlamaForCausalLM", **stated)
    assert quantization_method(config) == method
    with pytest.raises(BadInput, match=rf"FOLDER is a quantized checkpoint \({method}\)\n.*the unquantized model"):
        refuse_other_kinds(config, "FOLDER")


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_methods_that_can_be_undone_pass(method: str) -> None:
    refuse_other_kinds(config_of("gpt_oss", "GptOssForCausalLM", quantization_config={"quant_method": method}), "x")
    assert quantization_method(config_of("llama", "LlamaForCausalLM")) is None
