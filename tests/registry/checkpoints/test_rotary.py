"""Rotary tables computed from config.json, compared with those of transformers."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.registry.checkpoints.rotary import Contradiction, NotRead, rotary_table, stated_parameters

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
LONGROPE = dict(rope_type="longrope", original_max_position_embeddings=64,
                short_factor=[1.0 + i / 10 for i in range(16)], long_factor=[1.0 + i for i in range(16)])  # fmt: skip


@pytest.mark.parametrize("length", [1, 1000])
@pytest.mark.parametrize(
    "parameters",
    [
        dict(rope_type="linear", factor=3.0),
        dict(rope_type="dynamic", factor=3.0),
        dict(rope_type="proportional", partial_rotary_factor=0.25),
        LLAMA3,
        YARN,
        YARN | dict(factor=None),
        YARN | dict(truncate=False, beta_fast=20, beta_slow=2),
        YARN | dict(attention_factor=1.5),
        YARN | dict(mscale=0.8, mscale_all_dim=0.5),
        LONGROPE,
        LONGROPE | dict(factor=8.0),
        LONGROPE | dict(attention_factor=1.3),
    ],
    ids=str,
)
def test_tables_are_those_of_transformers(parameters: dict[str, Any], length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = parameters | {"rope_theta": 50000.0}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=256, rope_parameters=dict(parameters)
    )
    frequencies, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    table = rotary_table(parameters, 32, 256, length)
    assert table.frequencies == pytest.approx(frequencies.tolist(), rel=1e-5)
    assert table.scaling == pytest.approx(scaling, rel=1e-6)


def test_a_partial_table_has_fewer_frequencies() -> None:
    table = rotary_table({"rope_theta": 100.0, "partial_rotary_factor": 0.5}, 8, 256)
    assert table.frequencies == pytest.approx([1.0, 0.1])


def test_a_table_that_cannot_be_computed_gives_the_reason() -> None:
    with pytest.raises(NotRead, match="'spiral' is not known"):
        rotary_table({"rope_theta": 1e4, "rope_type": "spiral"}, 8, 256)
    with pytest.raises(NotRead, match="'linear' without factor"):
        rotary_table({"rope_theta": 1e4, "rope_type": "linear"}, 8, 256)
    with pytest.raises(NotRead, match="16 factors of longrope for 4 frequencies"):
        rotary_table(LONGROPE | {"rope_theta": 1e4}, 8, 256)


@pytest.mark.parametrize(
    ("raw", "layer_type", "expected"),
    [
        (dict(rope_theta=5e5, rope_scaling=None), None, {"rope_theta": 5e5}),
        (dict(rope_scaling=dict(type="su", rope_theta=5e5)), None, {"rope_theta": 5e5, "rope_type": "longrope"}),
        (dict(rope_scaling=dict(type="yarn", short_factor=[1.0])), None,
         {"rope_type": "longrope", "short_factor": [1.0]}),
        (dict(rotary_emb_base=5e5, rotary_pct=0.5), None, {"rope_theta": 5e5, "partial_rotary_factor": 0.5}),
        (dict(rope_parameters=dict(rope_theta=5e5), rope_theta=5e5), None, {"rope_theta": 5e5}),
        (dict(rope_theta=5e5, rope_local_base_freq=1e4, rope_scaling=dict(factor=8.0)), "sliding_attention",
         {"rope_theta": 1e4}),
        (dict(rope_theta=5e5, rope_local_base_freq=1e4, rope_scaling=dict(factor=8.0)), "full_attention",
         {"rope_theta": 5e5, "factor": 8.0}),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=5e5), sliding_attention=None)), None,
         {"rope_theta": 5e5}),
        (dict(rope_parameters=dict(a=dict(rope_theta=5e5), b=dict(rope_theta=1e4)), rope_theta=1e4), "a",
         {"rope_theta": 5e5}),
    ],
)  # fmt: skip
def test_parameters_of_each_form(raw: dict[str, Any], layer_type: str | None, expected: dict[str, Any]) -> None:
    assert {name: value for name, (_, value) in stated_parameters(raw, layer_type).items()} == expected


def test_two_statements_of_one_parameter_must_agree() -> None:
    with pytest.raises(Contradiction) as raised:
        stated_parameters(dict(rope_parameters=dict(rope_theta=5e5), rope_theta=1e4))
    assert raised.value.args == ("rope_parameters.rope_theta is 500000.0", "rope_theta is 10000.0")


def test_a_table_per_layer_type_is_not_one_for_all() -> None:
    with pytest.raises(NotRead, match="one table per layer type"):
        stated_parameters(dict(rope_parameters=dict(a=dict(rope_theta=5e5), b=dict(rope_theta=1e4))))
