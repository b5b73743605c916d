"""optimum in its subprocess: what it exports, and that a model that transformers 4 reads otherwise is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.parity import measure_parity
from limbeck.export.optimum.engine import write_optimum_graph
from limbeck.export.optimum.model_types import MODEL_TYPES
from limbeck.registry.checkpoints.load import load_model
from limbeck.registry.core.errors import BadInput
from tests.families import Family, make_checkpoint

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=128)  # fmt: skip
WINDOW = dict(sliding_window=16)
GPT = dict(n_embd=32, n_layer=2, n_head=2, n_positions=128)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
DEEPSEEK = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
                n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32,
                first_k_dense_replace=1, num_key_value_heads=2)  # fmt: skip
LAYER_TYPES = dict(
    layer_types=["sliding_attention", "full_attention"],
    rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    ),
)


def rotary(kind: str, **parameters: Any) -> dict[str, Any]:
    return SIZES | dict(rope_parameters=dict(rope_type=kind, rope_theta=5000.0, **parameters))


# One tiny model for each family, and one for each way to write rotary parameters.
CONFIGS: dict[str, dict[str, Any]] = {
    "arcee": SIZES,
    "bloom": dict(hidden_size=32, n_layer=2, n_head=2),
    "codegen": GPT | dict(n_head=4, rotary_dim=8, n_ctx=128),
    "cohere": SIZES,
    "deepseek_v3": SIZES | DEEPSEEK,
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    "falcon: alibi": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=True),
    "gemma": SIZES | dict(head_dim=16),
    "gemma2": SIZES | WINDOW | dict(head_dim=16, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "gemma3_text": SIZES | WINDOW | LAYER_TYPES | dict(head_dim=16),
    "glm": SIZES | dict(head_dim=16),
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": dict(hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
                    window_size=16, max_position_embeddings=128),
    "gpt_neox": rotary("default", partial_rotary_factor=0.5) | dict(num_key_value_heads=2),
    "gpt_oss": SIZES | WINDOW | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "gptj": GPT | dict(rotary_dim=8),
    "granite": SIZES | dict(embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0),
    "helium": SIZES | dict(head_dim=16),
    "llama": SIZES,
    "llama: llama3": rotary("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                            original_max_position_embeddings=32),
    "llama: dynamic": rotary("dynamic", factor=2.0),
    "llama: yarn": rotary("yarn", factor=4.0, original_max_position_embeddings=32),
    "llama: a head size of 20": SIZES | dict(hidden_size=40),
    "mistral": SIZES | WINDOW,
    "mpt": dict(d_model=32, n_layers=2, n_heads=2, max_seq_len=128),
    "nemotron": SIZES,
    "olmo": SIZES | dict(clip_qkv=0.5),
    "olmo2": rotary("linear", factor=4.0),
    "opt": SIZES | dict(ffn_dim=64, word_embed_proj_dim=32),
    "opt: 350m": SIZES | dict(ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi": rotary("default", partial_rotary_factor=0.5) | dict(num_key_value_heads=2),
    "phi3": SIZES | WINDOW,
    "phi3: longrope": rotary("longrope", short_factor=[1.0 + i / 10 for i in range(8)],
                             long_factor=[2.0 + i for i in range(8)], original_max_position_embeddings=32),
    "qwen2": SIZES | WINDOW | dict(use_sliding_window=True, max_window_layers=1),
    "qwen3": SIZES | dict(head_dim=16),
    "qwen3_moe": SIZES | EXPERTS | dict(head_dim=16),
    "smollm3": SIZES | dict(no_rope_layer_interval=2),
    "stablelm": rotary("default", partial_rotary_factor=0.5) | dict(num_key_value_heads=2),
}  # fmt: skip


def test_every_family_is_tried() -> None:
    assert {name.partition(":")[0] for name in CONFIGS} == MODEL_TYPES


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_is_exported_and_equals_pytorch(name: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    family = Family(name, name.partition(":")[0], CONFIGS[name])
    model = make_checkpoint(family, tokenizer_folder, tmp_path / "torch")
    export_onnx(model, tmp_path / "onnx", engine="optimum")
    parity = measure_parity(model, tmp_path / "onnx", max_documents=4, max_tokens=96, new_tokens=8)
    assert parity.passed
    assert parity.max_logprob_diff < 1e-5


def test_a_model_that_transformers_4_reads_otherwise_is_refused_with_both_values(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model: Any = load_model(tiny_llama)
    model.model.layers[0].self_attn.scaling *= 2  # the checkpoint does not say so
    with pytest.raises(BadInput, match="reads it otherwise") as refused:
        write_optimum_graph(model, tmp_path, "the model", print)
    found, expected = map(float, re.findall(r"-\d+\.\d{6}", refused.value.message))
    assert abs(found - expected) > 1e-3
    assert list(tmp_path.iterdir()) == []
