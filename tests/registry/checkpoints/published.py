"""config.json files as transformers 4 wrote them for published models, scaled down to two layers; models of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, vocab_size=64, bos_token_id=1, eos_token_id=2)  # fmt: skip
LLAMA = SIZES | dict(
    architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, attention_dropout=0.0,
    hidden_act="silu", initializer_range=0.02, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.45.0.dev0", use_cache=True,
)  # fmt: skip
LLAMA3_SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64,
                      rope_type="llama3")  # fmt: skip
MISTRAL = LLAMA | dict(architectures=["MistralForCausalLM"], model_type="mistral", head_dim=8, rope_theta=1000000.0,
                       sliding_window=None)  # fmt: skip
QWEN = SIZES | dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", attention_dropout=0.0, hidden_act="silu",
    initializer_range=0.02, max_window_layers=2, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=128,
    tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.43.1", use_cache=True,
    use_mrope=False, use_sliding_window=False,
)  # fmt: skip
GEMMA = SIZES | dict(
    attention_bias=False, attention_dropout=0.0, cache_implementation="hybrid", head_dim=16,
    hidden_activation="gelu_pytorch_tanh", initializer_range=0.02, pad_token_id=0, query_pre_attn_scalar=16,
    rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=32, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
FACTORS = dict(short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.1, 2.5, 6.0, 20.0])
PHI = SIZES | dict(
    architectures=["Phi3ForCausalLM"], model_type="phi3", attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    hidden_act="silu", initializer_range=0.02, original_max_position_embeddings=64, pad_token_id=0, resid_pdrop=0.0,
    rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=False, torch_dtype="bfloat16",
    transformers_version="4.40.2", use_cache=True, rope_scaling=FACTORS | {"type": "longrope"},
)  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 3.1": LLAMA | dict(rope_scaling=LLAMA3_SCALING, eos_token_id=[2, 3]),
    "Llama 3.2": LLAMA | dict(rope_scaling=LLAMA3_SCALING | {"factor": 32.0}, head_dim=8, tie_word_embeddings=True),
    "Qwen 2.5": QWEN,
    "Qwen 2.5, yarn": QWEN
    | dict(rope_scaling={"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"}),
    "Qwen 3": QWEN
    | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False, head_dim=16, rope_scaling=None,
           sliding_window=None),
    "Mistral 7B v0.3": MISTRAL,
    "Gemma 2": GEMMA
    | dict(architectures=["Gemma2ForCausalLM"], model_type="gemma2", attn_logit_softcapping=50.0,
           final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh"),
    "Gemma 3": GEMMA
    | dict(architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", attn_logit_softcapping=None,
           final_logit_softcapping=None, rope_local_base_freq=10000, rope_theta=1000000,
           rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window_pattern=2),
    "Phi-3 128k": PHI,
    "Phi-4-mini": PHI
    | dict(full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False, partial_rotary_factor=0.75,
           rope_scaling={key: value[:3] for key, value in FACTORS.items()} | {"type": "longrope"},
           tie_word_embeddings=True),
    "SmolLM2": LLAMA
    | dict(is_llama_config=True, rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True)
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
    "SmolLM3": LLAMA
    | dict(architectures=["SmolLM3ForCausalLM"], model_type="smollm3", layer_types=["full_attention"] * 2,
           max_window_layers=28, no_rope_layer_interval=4, no_rope_layers=[1, 0], pad_token_id=0, rope_scaling=None,
           rope_theta=5000000.0, sliding_window=None, tie_word_embeddings=True, use_sliding_window=False),
    "OLMo 2": LLAMA | dict(architectures=["Olmo2ForCausalLM"], model_type="olmo2", rope_scaling=None, pad_token_id=0),
    "OLMo 3": LLAMA
    | dict(architectures=["Olmo3ForCausalLM"], model_type="olmo3", sliding_window=32,
           layer_types=["sliding_attention", "full_attention"],
           rope_scaling=dict(attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0,
                             original_max_position_embeddings=32, rope_type="yarn")),
    "Granite 3": LLAMA
    | dict(architectures=["GraniteForCausalLM"], model_type="granite", attention_multiplier=0.0078125,
           embedding_multiplier=12.0, logits_scaling=16.0, residual_multiplier=0.22, rope_scaling=None),
    "GPT-2": dict(
        activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=1,
        embd_pdrop=0.1, eos_token_id=2, initializer_range=0.02, layer_norm_epsilon=1e-5, model_type="gpt2", n_ctx=256,
        n_embd=32, n_head=4, n_layer=2, n_positions=256, resid_pdrop=0.1, summary_activation=None,
        summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}, vocab_size=64),
    "Pythia": dict(
        architectures=["GPTNeoXForCausalLM"], bos_token_id=0, eos_token_id=0, hidden_act="gelu", hidden_size=32,
        initializer_range=0.02, intermediate_size=64, layer_norm_eps=1e-5, max_position_embeddings=256,
        model_type="gpt_neox", num_attention_heads=2, num_hidden_layers=2, rotary_emb_base=10000, rotary_pct=0.25,
        tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.24.0", use_cache=True,
        use_parallel_residual=True, vocab_size=64),
    "Falcon": dict(
        alibi=False, apply_residual_connection_post_layernorm=False, architectures=["FalconForCausalLM"],
        attention_dropout=0.0, bias=False, bos_token_id=1, eos_token_id=2, hidden_dropout=0.0, hidden_size=32,
        initializer_range=0.02, layer_norm_epsilon=1e-5, model_type="falcon", multi_query=True,
        new_decoder_architecture=False, num_attention_heads=4, num_hidden_layers=2, parallel_attn=True,
        torch_dtype="bfloat16", transformers_version="4.27.4", use_cache=True, vocab_size=64),
    "BLOOM": dict(
        apply_residual_connection_post_layernorm=False, architectures=["BloomForCausalLM"], attention_dropout=0.0,
        attention_softmax_in_fp32=True, bias_dropout_fusion=True, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        unk_token_id=0, hidden_dropout=0.0, initializer_range=0.02, layer_norm_epsilon=1e-5, masked_softmax_fusion=True,
        model_type="bloom", n_embed=32, n_inner=None, n_layer=2, num_attention_heads=4, offset_alibi=100,
        pretraining_tp=1, seq_length=256, skip_bias_add=True, skip_bias_add_qkv=False, transformers_version="4.20.0",
        use_cache=True, vocab_size=64),
    "OPT": dict(
        _remove_final_layer_norm=False, activation_dropout=0.0, activation_function="relu",
        architectures=["OPTForCausalLM"], attention_dropout=0.0, bos_token_id=2, do_layer_norm_before=True, dropout=0.1,
        eos_token_id=2, ffn_dim=64, hidden_size=32, init_std=0.02, layerdrop=0.0, max_position_embeddings=256,
        model_type="opt", num_attention_heads=4, num_hidden_layers=2, pad_token_id=1, prefix="</s>",
        torch_dtype="float16", transformers_version="4.21.0.dev0", use_cache=True, vocab_size=64,
        word_embed_proj_dim=32),
    "StableLM 2": SIZES
    | dict(architectures=["StableLmForCausalLM"], hidden_act="silu", initializer_range=0.02, layer_norm_eps=1e-5,
           model_type="stablelm", partial_rotary_factor=0.25, num_attention_heads=2, rope_theta=10000,
           tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.38.0", use_cache=True,
           use_qkv_bias=True),
}  # fmt: skip


def make_model(raw: dict[str, Any]) -> Any:
    """A randomly initialised model from the content of a config.json, as transformers reads it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    values = copy.deepcopy(raw)
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    config.dtype = torch.float32
    return AutoModelForCausalLM.from_config(config).eval()


def write_checkpoint(folder: Path, raw: dict[str, Any]) -> Path:
    """Write a config.json as it is, and the weights of a randomly initialised model."""
    make_model(raw).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def logits(model: Any) -> np.ndarray:
    """The logits of a model after each of 119 tokens, (1, 119, vocabulary)."""
    import torch

    with torch.no_grad():
        return model(torch.arange(1, 120).remainder(61)[None]).logits.numpy()
