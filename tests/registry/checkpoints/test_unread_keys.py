"""Keys of config.json that no code of the family reads: refused if they change the numbers, reported otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.registry.checkpoints.unread_keys import refuse_unread_keys
from limbeck.registry.core.errors import BadInput
from tests.registry.checkpoints.published import LLAMA, MISTRAL, PUBLISHED, QWEN, make_model


@pytest.mark.parametrize(
    "change",
    [
        dict(sliding_window=16),
        dict(final_logit_softcapping=30.0),
        dict(residual_multiplier=0.22),
        dict(logits_scaling=16.0),
        dict(qk_norm=True),
        dict(rope_interleaved=True),
        dict(query_pre_attn_scalar=256),
        dict(rope_parameters=dict(rope_type="default", rope_theta=5e5, llama_4_scaling_beta=0.1)),
    ],
    ids=str,
)
def test_a_key_that_changes_the_numbers_is_refused(change: dict[str, Any]) -> None:
    key = "rope_parameters.llama_4_scaling_beta" if "rope_parameters" in change else next(iter(change))
    raw = LLAMA | change
    with pytest.raises(BadInput, match=f"no code of LlamaForCausalLM reads {key} = "):
        refuse_unread_keys(raw, make_model(raw), True, "config.json")


@pytest.mark.parametrize(
    "change",
    [
        dict(sliding_window=None),
        dict(sliding_window=4096),  # more than max_position_embeddings
        dict(sliding_window=16, use_sliding_window=False),
        dict(residual_multiplier=1.0),
        dict(rope_interleaved=False),
        dict(final_logit_softcapping=None),
        dict(layer_norm_eps=1e-6),  # beside the rms_norm_eps that the family reads
        dict(hidden_activation="gelu"),
    ],
    ids=str,
)
def test_a_neutral_value_is_reported(change: dict[str, Any]) -> None:
    raw = LLAMA | change
    assert {*refuse_unread_keys(raw, make_model(raw), True, "config.json")} == {*change}


def test_the_only_norm_epsilon_must_be_read() -> None:
    raw = {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"} | dict(layer_norm_eps=1e-6)
    with pytest.raises(BadInput, match="layer_norm_eps = 1e-06"):
        refuse_unread_keys(raw, make_model(raw), True, "config.json")


def test_rotary_keys_of_a_model_without_rotary_tables_are_refused() -> None:
    raw = PUBLISHED["GPT-2"] | dict(rope_theta=500000.0)
    with pytest.raises(BadInput, match="no code of GPT2LMHeadModel reads rope_theta"):
        refuse_unread_keys(raw, make_model(raw), False, "config.json")


@pytest.mark.parametrize(
    ("raw", "unread"),
    [
        (LLAMA, []),
        (QWEN, ["use_mrope"]),
        (MISTRAL | dict(sliding_window=16), ["attention_bias", "mlp_bias"]),
        (PUBLISHED["Falcon"], ["apply_residual_connection_post_layernorm"]),
    ],
)
def test_what_the_family_reads_is_not_reported(raw: dict[str, Any], unread: list[str]) -> None:
    assert refuse_unread_keys(raw, make_model(raw), True, "config.json") == unread
