"""A checkpoint made of a GGUF file computes what the model that was written into the file computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from limbeck.registry.checkpoints.gguf.config import ARCHITECTURES
from limbeck.registry.checkpoints.gguf.convert import checkpoint_of_gguf
from limbeck.registry.checkpoints.load import load_model, load_tokenizer
from limbeck.registry.core.digest import file_digest, read_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from tests.registry.checkpoints.gguf.gguf_files import sizes, tokens_of_folder, write_model

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=0)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}


@pytest.fixture(scope="session")
def tokens(tokenizer_folder: Path) -> dict[str, Any]:
    return tokens_of_folder(tokenizer_folder)


@pytest.fixture
def make_model(tokens: dict[str, Any]) -> Callable[..., PreTrainedModel]:
    """Makes a model with random weights that differ from each other."""

    def make(model_type: str, **config: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, vocab_size=len(tokens["tokens"]), **SIZES | config)
        ).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(noise * 0.1 if parameter.ndim == 2 else parameter + 0.1 * noise)
        return made

    return make


def largest_difference(folder: Path, model: PreTrainedModel) -> float:
    """Of logits over more positions than windows and original contexts have."""
    ids = torch.arange(200)[None] * 7 % model.config.vocab_size
    with torch.inference_mode():
        return float((load_model(folder)(ids).logits - model(ids).logits).abs().max())


CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {}, {}),
    "tied, large theta": (
        "llama", "llama", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e5)),
        {"rope.freq_base": 1e5},
    ),
    "biases": ("llama", "llama", dict(attention_bias=True, mlp_bias=True), {}),
    "head size": ("llama", "llama", dict(head_dim=16), {"attention.key_length": 16, "attention.value_length": 16,
                                                        "rope.dimension_count": 16}),
    "linear": ("llama", "llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
               {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn": ("llama", "llama", dict(rope_parameters=YARN), YARN_KEYS),
    "qwen2": ("qwen2", "qwen2", dict(rms_norm_eps=1e-5), {}),
    "qwen3": ("qwen3", "qwen3", dict(head_dim=16), {"attention.key_length": 16, "attention.value_length": 16}),
    "gemma3": (
        "gemma3_text", "gemma3",
        dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=16, final_logit_softcapping=None,
             tie_word_embeddings=True, layer_types=["sliding_attention", "full_attention"]),
        {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 16,
         "attention.sliding_window_pattern": 2, "rope.freq_base": 1e6},
    ),
    "qwen3moe": (
        "qwen3_moe", "qwen3moe",
        dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True),
        {"attention.key_length": 16, "attention.value_length": 16, "expert_count": 4, "expert_used_count": 2,
         "expert_feed_forward_length": 24},
    ),
    "stablelm": ("stablelm", "stablelm", dict(use_qkv_bias=True),
                 {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 2}),
    "starcoder2": ("starcoder2", "starcoder2", dict(tie_word_embeddings=True), {"attention.layer_norm_epsilon": 1e-5}),
    "gpt2": ("gpt2", "gpt2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, n_inner=48),
             {"attention.layer_norm_epsilon": 1e-5, "feed_forward_length": 48, "attention.head_count_kv": 0}),
    "lfm2": (
        "lfm2", "lfm2",
        dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, tie_word_embeddings=True),
        {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3, "rope.freq_base": 1e6,
         "attention.layer_norm_rms_epsilon": 1e-5},
    ),
    "qwen35": (
        "qwen3_5_text", "qwen35",
        dict(head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
             linear_value_head_dim=8, full_attention_interval=2, layer_types=["linear_attention", "full_attention"]),
        {"attention.key_length": 16, "attention.value_length": 16, "full_attention_interval": 2,
         "attention.recurrent_layers": [True, False], "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.group_count": 2,
         "ssm.time_step_rank": 2, "ssm.inner_size": 16, "rope.dimension_count": 4,
         "rope.dimension_sections": [11, 11, 10, 0], "rope.freq_base": 1e4},
    ),
    "gemma2": (
        "gemma2", "gemma2",
        dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=16, attn_logit_softcapping=3.0,
             final_logit_softcapping=2.0, tie_word_embeddings=True),
        {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 16,
         "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_in_the_file(
    case: str, make_model: Callable[..., PreTrainedModel], tokens: dict[str, Any], tmp_path: Path, limbeck_home: Path
) -> None:
    model_type, architecture, config, keys = CASES[case]
    model = make_model(model_type, **config)
    file = write_model(tmp_path / "model.gguf", model, architecture, sizes(model) | keys, tokens)
    converted = checkpoint_of_gguf(file)
    assert largest_difference(converted.path, model) == 0.0
    assert load_model(converted.path).generation_config.eos_token_id == 0


def test_every_architecture_is_tried() -> None:
    assert {architecture for _, architecture, _, _ in CASES.values()} | {"phi3"} == set(ARCHITECTURES)


def test_the_rotary_scaling_of_llama_3(
    make_model: Callable[..., PreTrainedModel], tokens: dict[str, Any], tmp_path: Path, limbeck_home: Path
) -> None:
    """The file has no keys of it, only the factor of each frequency."""
    model = make_model("llama", head_dim=32, rope_parameters=LLAMA3)
    frequencies = model.model.rotary_emb.inv_freq
    unscaled = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    keys = sizes(model) | {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}
    file = tmp_path / "model.gguf"
    write_model(file, model, "llama", keys, tokens, tensors={"rope_freqs.weight": unscaled / frequencies})
    converted = checkpoint_of_gguf(file)
    assert AutoConfig.from_pretrained(converted.path).rope_parameters == LLAMA3
    assert largest_difference(converted.path, model) < 1e-5


def test_longrope(
    make_model: Callable[..., PreTrainedModel], tokens: dict[str, Any], tmp_path: Path, limbeck_home: Path
) -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    longrope = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=64, **factors)
    longrope["attention_factor"] = 1.25
    model = make_model("phi3", rope_parameters=longrope, original_max_position_embeddings=64)
    tables = {f"rope_factors_{name}.weight": torch.tensor(factors[f"{name}_factor"]) for name in ("short", "long")}
    keys = sizes(model) | {
        "rope.dimension_count": 8,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": 1.25,
        "attention.sliding_window": 0,
    }
    file = write_model(tmp_path / "model.gguf", model, "phi3", keys, tokens, tensors=tables)
    assert largest_difference(checkpoint_of_gguf(file).path, model) < 1e-5


def test_quantized_weights_are_dequantized_exactly(
    make_model: Callable[..., PreTrainedModel], tokens: dict[str, Any], tmp_path: Path, limbeck_home: Path
) -> None:
    model = make_model("qwen2")
    kind = gguf.GGMLQuantizationType.Q8_0
    file = write_model(tmp_path / "model.gguf", model, "qwen2", sizes(model), tokens, quantized=kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.from_numpy(dequantize(quantize(parameter.numpy(), kind), kind)))
    assert largest_difference(checkpoint_of_gguf(file).path, model) == 0.0


def test_a_conversion_is_made_once_and_says_from_what(
    make_model: Callable[..., PreTrainedModel], tokens: dict[str, Any], tmp_path: Path, limbeck_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = make_model("qwen2")
    tokens = tokens | {"eot_token_id": 5}
    file = write_model(tmp_path / "model.gguf", model, "qwen2", sizes(model), tokens)
    first = checkpoint_of_gguf(file)
    assert "converting model.gguf (gguf, " in capsys.readouterr().err
    source = read_manifest(first.path)["source"]
    assert (source["kind"], source["files"]) == ("gguf", {"model.gguf": file_digest(file)})
    assert {"transformers", "gguf"} <= source["packages"].keys()
    assert checkpoint_of_gguf(file) == first
    assert capsys.readouterr().err == ""
    assert load_model(first.path).generation_config.eos_token_id == [0, 5]  # the end of a text and of a turn


def test_a_tokenizer_beside_the_file_is_taken(
    make_model: Callable[..., PreTrainedModel], tokens: dict[str, Any], tmp_path: Path, limbeck_home: Path,
    tokenizer_folder: Path,
) -> None:  # fmt: skip
    model = make_model("qwen2")
    file = write_model(tmp_path / "model.gguf", model, "qwen2", sizes(model), tokens | {"pre": "unheard-of"})
    with pytest.raises(BadInput, match=r"pre-tokenizer 'unheard-of' is not known; known are .*smollm.*\n.*beside"):
        checkpoint_of_gguf(file)
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    converted = checkpoint_of_gguf(file)
    assert (converted.path / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
    assert load_tokenizer(converted.path)("a b").input_ids == load_tokenizer(tokenizer_folder)("a b").input_ids
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(BadInput, match=r"is not the tokenizer of model\.gguf: '[ab]' is \d+, not \d+"):
        checkpoint_of_gguf(file)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.clamp_kqv": 8.0}, r"cannot carry over qwen2\.attention\.clamp_kqv = 8\.0"),
        ({"rope.scaling.type": "dynamic"}, r"qwen2\.rope\.scaling\.type is 'dynamic'"),
        ({"attention.value_length": 16}, "heads of 8 for keys and of 16 for values"),
        ({"attention.causal": False}, "is an encoder"),
        ({"block_count": 3}, "lacks weights .*model.layers.2"),
        ({"block_count": 1}, "has 37,920 weights, and Qwen2ForCausalLM takes 28,576"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(
    keys: dict[str, Any], message: str, make_model: Callable[..., PreTrainedModel], tokens: dict[str, Any],
    tmp_path: Path, limbeck_home: Path,
) -> None:  # fmt: skip
    """transformers' own loader computes another model, or fills what is missing at random."""
    model = make_model("qwen2")
    file = write_model(tmp_path / "model.gguf", model, "qwen2", sizes(model) | keys, tokens)
    with pytest.raises(BadInput, match=message):
        checkpoint_of_gguf(file)
    assert list((limbeck_home / "checkpoints").glob("*")) == []  # nothing half made is left


def test_an_architecture_that_is_not_supported(
    make_model: Callable[..., PreTrainedModel], tokens: dict[str, Any], tmp_path: Path, limbeck_home: Path
) -> None:
    model = make_model("olmo2")
    file = write_model(tmp_path / "model.gguf", model, "olmo2", sizes(model), tokens)
    with pytest.raises(BadInput, match=r"architecture 'olmo2' is not supported; supported are gemma2, .*llama, "):
        checkpoint_of_gguf(file)


def test_a_damaged_file(
    make_model: Callable[..., PreTrainedModel], tokens: dict[str, Any], tmp_path: Path, limbeck_home: Path
) -> None:
    model = make_model("qwen2")
    file = write_model(tmp_path / "model.gguf", model, "qwen2", sizes(model), tokens)
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:1000], b"GGML" + whole[4:], b""):
        file.write_bytes(damaged)
        with pytest.raises(DamagedArtifact, match=r"model\.gguf is damaged"):
            checkpoint_of_gguf(file)
    part = tmp_path / "model-00001-of-00002.gguf"
    part.write_bytes(whole)
    with pytest.raises(BadInput, match=r"one of 2 parts.*\n.*llama-gguf-split --merge"):
        checkpoint_of_gguf(part)
