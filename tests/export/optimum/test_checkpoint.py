"""Configs of transformers 5 become what transformers 4 read: its own names for the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from limbeck.export.optimum.checkpoint import config_of_transformers_4

THETA = dict(rope_theta=5000.0)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LONG = dict(short_factor=[1.0] * 48, long_factor=[2.0] * 48)
LAYER_TYPES = dict(
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
    sliding_attention=dict(rope_type="default", rope_theta=1e4),
)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "no scaling": ("llama", dict(rope_type="default", **THETA), dict(rope_theta=5000.0, rope_scaling=None)),
    "llama3": (
        "llama",
        dict(rope_type="llama3", **THETA, **LLAMA3),
        dict(rope_theta=5000.0, rope_scaling=dict(rope_type="llama3", **LLAMA3)),
    ),
    "the type has another key": (
        "olmo2",
        dict(rope_type="linear", factor=4.0, **THETA),
        dict(rope_theta=5000.0, rope_scaling=dict(type="linear", factor=4.0)),
    ),
    "longrope": (
        "phi3",
        dict(rope_type="longrope", **THETA, **LONG),
        dict(original_max_position_embeddings=4096, rope_scaling=dict(type="longrope", **LONG)),
    ),
    "a part of each head": (
        "phi",
        dict(rope_type="default", partial_rotary_factor=0.5, **THETA),
        dict(partial_rotary_factor=0.5, rope_scaling=None),
    ),
    "names of its own": (
        "gpt_neox",
        dict(rope_type="default", partial_rotary_factor=0.5, **THETA),
        dict(rotary_pct=0.5, rotary_emb_base=5000.0),
    ),
    "layer types": (
        "gemma3_text",
        LAYER_TYPES,
        dict(rope_theta=1e6, rope_scaling=dict(rope_type="linear", factor=8.0), rope_local_base_freq=1e4),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rotary_parameters_get_the_names_of_transformers_4(case: str) -> None:
    model_type, rope, expected = CASES[case]
    config = AutoConfig.for_model(model_type, rope_parameters=rope, max_position_embeddings=128)
    translated = config_of_transformers_4(config)
    assert translated.items() >= expected.items()
    assert "rope_parameters" not in translated


def test_a_renamed_key_has_its_old_name_too() -> None:
    assert config_of_transformers_4(AutoConfig.for_model("qwen3_moe", num_experts=4))["num_experts"] == 4


def test_defaults_are_written() -> None:
    """They may differ between the versions."""
    assert config_of_transformers_4(AutoConfig.for_model("llama"))["rms_norm_eps"] == 1e-6


def test_code_of_the_checkpoint_is_not_named() -> None:
    config = AutoConfig.for_model("llama", auto_map={"AutoModelForCausalLM": "code.Model"})
    assert "auto_map" not in config_of_transformers_4(config)
