"""The families with a fused graph: each, with each switch, is compared with PyTorch. The README lists them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from limbeck.export.graph.families.table import FAMILIES as GRAPH_FAMILIES
from limbeck.export.graph.families.table import decoder_from_model
from limbeck.export.graph.reader import ModelReader, UnsupportedModel
from tests import ROOT
from tests.families import (
    FAMILIES,
    LONGROPE,
    NOISE,
    OF_OTHER_KINDS,
    README_MARKS,
    UNSUPPORTED,
    UNSUPPORTED_MARKS,
    YARN,
    Family,
    export_family,
    format_table,
    format_unsupported,
    measure_family,
)
from tests.fused_model import largest_difference, make_fused_model, make_torch_model

# The first of each type: their switches are the same.
OF_EACH_TYPE = list({family.model_type: family for family in reversed(FAMILIES)}.values())[::-1]
README = ROOT / "README.md"
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
EACH_TYPE = pytest.mark.parametrize("family", OF_EACH_TYPE, ids=[family.model_type for family in OF_EACH_TYPE])
LENGTH = 48  # tokens of a text: more than the windows and original lengths
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=128, vocab_size=300)  # fmt: skip

# Keys of configurations that change the numbers of some family without a new parameter, or with one -> values to try.
# A key with True or False is tried with the other value.
SWITCHES: dict[str, list[Any]] = {
    "_remove_final_layer_norm": [True],
    "activation": ["relu", "silu"],
    "activation_function": ["relu", "gelu"],
    "alibi": [True],
    "apply_residual_connection_post_layernorm": [True],
    "attention_bias": [True],
    "attention_k_eq_v": [False],
    "attention_multiplier": [0.4],
    "attention_out_bias": [True],
    "attn_config": [dict(softmax_scale=0.4, clip_qkv=0.5, qk_ln=True, prefix_lm=True)],
    "attn_logit_softcapping": [0.5, None],
    "bias": [True],
    "clip_qkv": [0.3, None],
    "conv_bias": [True],
    "decoder_sparse_step": [2],
    "do_layer_norm_before": [False],
    "embedding_multiplier": [2.0],
    "enable_bias": [False],
    "enable_moe_block": [True],
    "final_logit_softcapping": [0.5, None],
    "first_k_dense_replace": [0],
    "head_dim": [24],
    "hidden_act": ["quick_gelu", "tanh"],
    "hidden_activation": ["relu"],
    "hidden_size_per_layer_input": [0],
    "layer_norm_elementwise_affine": [False],
    "layer_norm_eps": [0.1],
    "layer_norm_epsilon": [0.1],
    "layer_types": [["sliding_attention", "full_attention"], ["chunked_attention"] * 2],
    "learned_pos_emb": [False],
    "linear_conv_kernel_dim": [2],
    "linear_num_value_heads": [2],
    "logit_scale": [0.7],
    "logits_scaling": [3.0],
    "mlp_bias": [True],
    "mlp_only_layers": [[]],
    "moe_norm_min": [2.0],
    "moe_num_shared_experts": [0, 2],
    "multi_query": [False],
    "n_group": [2],
    "new_decoder_architecture": [True],
    "no_rope_layers": [[0, 1]],
    "norm_eps": [0.1],
    "norm_epsilon": [0.1],
    "norm_topk_prob": [True, False],
    "num_experts_per_tok": [1, 3],
    "num_kv_shared_layers": [0],
    "num_ln_in_parallel_attn": [1, 2],
    "num_shared_experts": [0, 2],
    "parallel_attn": [False],
    "position_embedding_type": [None],
    "pretraining_tp": [2],
    "qk_layernorm": [True, False],
    "qkv_bias": [True, False],
    "query_pre_attn_scalar": [3],
    "reorder_and_upcast_attn": [True],
    "residual_multiplier": [0.6],
    "rms_norm_eps": [0.1],
    "rotary_dim": [4, None],
    "routed_scaling_factor": [0.7],
    "scale_attn_by_inverse_layer_idx": [True],
    "scale_attn_weights": [False],
    "scale_embedding": [False],
    "scoring_func": ["softmax", "sigmoid"],
    "shared_intermediate_size": [0],
    "sliding_window": [7, None],
    "sliding_window_pattern": [2],
    "slow_but_exact": [True],
    "swiglu_alpha": [1.0],
    "swiglu_limit": [0.1],
    "tie_word_embeddings": [True, False],
    "use_bias": [True, False],
    "use_bidirectional_attention": [True],
    "use_double_wide_mlp": [False],
    "use_expert_bias": [False],
    "use_parallel_residual": [True, False],
    "use_post_norm": [False],
    "use_qk_norm": [True, False],
    "use_qkv_bias": [True],
    "use_sliding_window": [True, False],
    "window_size": [5],
    "word_embed_proj_dim": [16],
    "rope_parameters": [
        dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.5),
        dict(rope_type="dynamic", rope_theta=10_000.0, factor=3.0),
        LONGROPE | dict(original_max_position_embeddings=64),
        YARN | dict(llama_4_scaling_beta=0.5),
        {kind: dict(rope_type="default", rope_theta=theta)
         for kind, theta in (("sliding_attention", 100.0), ("full_attention", 1000.0))},
    ],
}  # fmt: skip


@EACH_FAMILY
def test_a_family_matches_pytorch(family: Family) -> None:
    assert measure_family(family) < family.max_difference


@pytest.mark.slow
@EACH_FAMILY
def test_a_family_exports_and_generates(family: Family, tokenizer_folder: Path, tmp_path: Path) -> None:
    parity = export_family(family, "fp32", tokenizer_folder, tmp_path)
    assert parity.passed
    assert parity.max_logprob_diff < family.max_difference
    assert parity.greedy_identical


@pytest.mark.slow
@EACH_FAMILY
def test_a_family_runs_in_float16(family: Family, tokenizer_folder: Path, tmp_path: Path) -> None:
    if "delta rule" in family.note:
        pytest.skip("onnxruntime has no gated delta rule in float16")
    assert export_family(family, "fp16", tokenizer_folder, tmp_path).mean_kl < 1e-4


def test_the_readme_has_the_table_and_the_list() -> None:
    text = README.read_text()
    for marks, written in ((README_MARKS, format_table()), (UNSUPPORTED_MARKS, format_unsupported())):
        assert text[text.index(marks[0]) : text.index(marks[1]) + len(marks[1])] == written


def test_each_family_of_transformers_is_in_the_table_or_the_list() -> None:
    fused = {family.model_type for family in FAMILIES}
    others = [name for names in (UNSUPPORTED | OF_OTHER_KINDS).values() for name in names]
    assert set(GRAPH_FAMILIES) == fused
    assert len(others) == len(set(others))
    assert fused.isdisjoint(others)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"gpt-sw3"}  # its models are of the type "gpt2"
    assert known == fused | set(others)


@EACH_TYPE
def test_a_switch_of_a_family_changes_the_graph_as_it_changes_pytorch(family: Family, tmp_path: Path) -> None:
    keys = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family.model_type])}
    assert misread(family, [key for key in SWITCHES if key in keys], tmp_path) == []


@pytest.mark.slow
@EACH_TYPE
def test_a_switch_of_another_family_changes_nothing(family: Family, tmp_path: Path) -> None:
    keys = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family.model_type])}
    assert misread(family, [key for key in SWITCHES if key not in keys], tmp_path) == []


def misread(family: Family, keys: list[str], folder: Path) -> list[str]:
    """Set each key to each of its values. Returns those with which the graph differs from PyTorch.

    A model that PyTorch cannot make or run does not count, nor one that is refused.
    """
    found = []
    for key in keys:
        for value in SWITCHES[key]:
            difference = difference_with(family, {key: value}, folder)
            if difference is not None and not difference < family.max_difference:
                found.append(f"{key}={value}: {difference:.2g}")
    return found


def difference_with(family: Family, changes: dict[str, Any], folder: Path) -> float | None:
    try:
        model = make_torch_model(family.model_type, family.config | changes, NOISE, vocab_size=300)
        with torch.inference_mode():
            model(torch.zeros(1, 4, dtype=torch.int64))
    except Exception:  # whatever transformers raises
        return None
    try:
        return largest_difference(make_fused_model(model, folder), LENGTH)
    except UnsupportedModel:
        return None


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("ctrl", {"n_embd": 32, "n_head": 2, "n_layer": 1}, "no description of the architecture 'ctrl'"),
        ("llama", {"hidden_act": "tanh"}, "the activation Tanh"),
        ("llama", {"head_dim": 20}, "a head size of 20: onnxruntime takes multiples of 8"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("opt", {"do_layer_norm_before": False}, "norms after each part"),
        ("opt", {"word_embed_proj_dim": 16}, "no place for model.decoder.project_in.weight"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ],
)
def test_an_unsupported_part_is_named(model_type: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        decoder_from_model(make_torch_model(model_type, SIZES | changes))


def test_a_parameter_that_is_not_read_is_named() -> None:
    model = make_torch_model("llama", SIZES)
    model.model.layers[0].self_attn.gate = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedModel, match=r"no place for model\.layers\.0\.self_attn\.gate"):
        decoder_from_model(model)


@pytest.mark.parametrize(
    ("model_type", "offset", "is_layer_norm"),
    [("llama", 0, False), ("gemma", 1, False), ("cohere", 0, True), ("nemotron", 1, True)],
)
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_norms_of_any_size_are_read(model_type: str, offset: int, is_layer_norm: bool, factor: float) -> None:
    model = make_torch_model(model_type, SIZES)
    with torch.no_grad():
        model.model.norm.weight *= factor
        model.model.norm.weight[::3] *= 0.01
    norm = ModelReader(model).norm(model.model.norm)
    assert np.array_equal(norm.weight, model.model.norm.weight.detach().numpy() + np.float32(offset))
    assert (norm.bias is not None) == is_layer_norm


def test_a_norm_that_computes_something_else_is_named() -> None:
    model = make_torch_model("llama", SIZES)
    model.model.norm.forward = lambda x: x * model.model.norm.weight
    with pytest.raises(UnsupportedModel, match=r"model\.norm is neither a layer norm nor an RMS norm"):
        decoder_from_model(model)


def test_a_model_with_code_of_its_own_is_refused() -> None:
    model = make_torch_model("llama", SIZES)
    del model.model.layers[0].mlp
    with pytest.raises(UnsupportedModel, match="is not as transformers has it"):
        decoder_from_model(model)
