"""Rotary tables of loaded models, compared with config.json: transformers misreads some forms without an error."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.registry.checkpoints.rotary_check import EQUAL, NO_TABLE, check_rotary
from limbeck.registry.core.errors import BadInput
from tests.registry.checkpoints.published import FACTORS, LLAMA, LLAMA3_SCALING, PHI, PUBLISHED, make_model


def without(raw: dict[str, Any], *starts: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if not key.startswith(starts)}


BARE = without(LLAMA, "rope")
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
GEMMA3 = without(PUBLISHED["Gemma 3"], "rope")
OLMO3 = without(PUBLISHED["OLMo 3"], "rope")
NEOX = without(PUBLISHED["Pythia"], "rotary")
TWO = dict(full_attention=dict(rope_type="default", rope_theta=3e6),
           sliding_attention=dict(rope_type="default", rope_theta=2e4))  # fmt: skip
GPTJ = dict(model_type="gptj", n_embd=32, n_head=2, n_layer=2, n_positions=64, rotary_dim=8, vocab_size=64)


@pytest.mark.parametrize(
    "raw",
    [
        BARE,
        BARE | dict(rope_scaling=dict(rope_type="default", rope_theta=5e5)),
        BARE | dict(rope_theta=5e5, rope_scaling={}),
        BARE | dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0)),
        BARE | dict(rope_theta=5e5, rope_scaling=dict(type="dynamic", factor=2.0)),
        BARE | dict(rope_theta=5e5, rope_scaling=YARN | dict(mscale=0.8, mscale_all_dim=0.5)),
        BARE | dict(rope_theta=5e5, rope_scaling=YARN | dict(truncate=False, finetuned=True)),
        BARE | dict(rope_theta=5e5, rope_scaling=dict(type="yarn", factor=4.0)),
        BARE | dict(rope_theta=5e5, rope_scaling=LLAMA3_SCALING),
        BARE | dict(rope_theta=5e5, rope_parameters=dict(rope_type="default", rope_theta=5e5)),
        BARE | dict(rope_theta=5e5, rope_parameters=dict(rope_type="linear", factor=2.0)),
        GEMMA3,
        GEMMA3 | dict(rope_theta=3e6, rope_local_base_freq=2e4),
        GEMMA3 | dict(rope_parameters=TWO),
        OLMO3 | dict(rope_parameters=TWO),
        NEOX | dict(rotary_pct=0.5, rotary_emb_base=20000),
        NEOX | dict(rope_parameters=dict(rope_type="default", rope_theta=20000, partial_rotary_factor=0.5)),
        PHI | dict(rope_scaling=FACTORS | dict(type="yarn")),
        PHI | dict(rope_scaling=FACTORS | dict(type="longrope", attention_factor=1.3)),
        GPTJ,
    ],
)
def test_what_transformers_reads_right_is_equal(raw: dict[str, Any]) -> None:
    assert check_rotary(make_model(raw), raw, "config.json") == EQUAL


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (BARE | dict(rotary_emb_base=5e5), "rotary_emb_base is 500000.0 in the file, 10000.0 in the loaded model"),
        (BARE | dict(partial_rotary_factor=0.5), "gives 4 rotary dimensions, the loaded model 8"),
        (BARE | dict(rope_parameters=dict(full_attention=dict(rope_theta=5e5))),
         "rope_parameters.full_attention.rope_theta is 500000.0 in the file, 10000.0"),
        (BARE | dict(rope_scaling=dict(type="dynamic", factor=1.0, alpha=1000.0)), "a frequency or scaling of"),
        (BARE | dict(rope_scaling=dict(factor=4.0)), "rope_scaling.factor is 4.0, which rope_type 'default' does not"),
        (without(LLAMA, "rope") | dict(rope_scaling=without(LLAMA3_SCALING, "rope_type")), "rope_scaling.factor is 8"),
        (NEOX | dict(rope_theta=20000), "rope_theta is 20000 in the file, 10000.0 in the loaded model"),
        (NEOX | dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5 in the file, 0.25 in the loaded model"),
        (GEMMA3 | dict(rope_parameters=dict(rope_type="default", rope_theta=3e6)),
         r"differs \(full_attention\).*rope_parameters.rope_theta is 3000000.0 in the file, 1000000.0"),
        (GEMMA3 | dict(rope_parameters=TWO | dict(full_attention=YARN | dict(rope_theta=3e6, truncate=False))),
         r"differs \(full_attention\): config.json gives a frequency"),
        (OLMO3 | dict(rope_theta=1e4), r"differs \(sliding_attention\).*is 10000.0 in the file, 500000.0 in"),
        (OLMO3 | dict(rope_parameters=YARN | dict(rope_theta=1e4)), "rope_type is 'yarn' in the file, 'default' in"),
        (GPTJ | dict(rope_theta=5e5), "rope_theta is 500000.0 in the file, 10000.0 in the loaded model"),
    ],
)  # fmt: skip
def test_what_transformers_misreads_is_refused_with_both_values(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_rotary(make_model(raw), raw, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # What transformers 4 writes after it has read a file of transformers 5.
        (dict(rope_theta=1e4, rope_parameters=dict(rope_type="default", rope_theta=5e5)),
         "rope_parameters.rope_theta is 500000.0, but rope_theta is 10000.0"),
        (dict(rope_theta=5e5, rope_parameters=LLAMA3_SCALING, rope_scaling=dict(rope_type="default")),
         "rope_parameters.rope_type is 'llama3', but rope_scaling.rope_type is 'default'"),
        (dict(rope_theta=5e5, rope_scaling=dict(type="linear", rope_type="dynamic", factor=2.0)),
         "rope_scaling.type is 'linear', but rope_scaling.rope_type is 'dynamic'"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    raw = BARE | changes
    with pytest.raises(BadInput, match=f"contradicts itself: {message}"):
        check_rotary(make_model(raw), raw, "config.json")


def test_a_table_that_was_changed_is_found_at_every_length() -> None:
    model = make_model(PHI)
    model.config.rope_parameters["long_factor"] = [1.0, 1.0, 1.0, 1.0]
    with pytest.raises(BadInput, match=r"long_factor is \[1.1, 2.5, 6.0, 20.0\] in the file"):
        check_rotary(model, PHI, "config.json")


def test_the_check_leaves_the_model_as_it_is() -> None:
    import torch

    model = make_model(PHI)
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        check_rotary(model, PHI, "config.json")
        assert torch.equal(model(ids).logits, before)


def test_what_cannot_be_read_is_reported_as_not_checked() -> None:
    raw = BARE | dict(rope_theta=5e5, rope_scaling=dict(rope_type="default", spiral=3.0))
    assert check_rotary(make_model(raw), raw, "f") == "not checked: rope_scaling.spiral is not known"


def test_a_default_that_changed_is_reported_as_not_checked() -> None:
    assert "another default than transformers 4" in check_rotary(make_model(OLMO3), OLMO3, "f")


def test_models_without_rotary_tables() -> None:
    assert check_rotary(make_model(PUBLISHED["GPT-2"]), PUBLISHED["GPT-2"], "f") == NO_TABLE
