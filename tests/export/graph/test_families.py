"""The families with a fused graph: each is exported, compared with PyTorch, and listed in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.export.graph.families.table import FAMILIES as GRAPH_FAMILIES
from limbeck.export.graph.families.table import decoder_from_model
from limbeck.export.graph.reader import UnsupportedModel
from tests import ROOT
from tests.families import FAMILIES, README_MARKS, Family, export_family, format_row, format_table

README = ROOT / "README.md"
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=128, vocab_size=300)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_a_family_matches_pytorch_and_the_readme(family: Family, tokenizer_folder: Path, tmp_path: Path) -> None:
    graph_kind, parity = export_family(family, tokenizer_folder, tmp_path)
    assert parity.passed
    assert parity.max_logprob_diff < 1e-4
    assert parity.greedy_identical
    if README_MARKS[0] in README.read_text():
        assert format_row(family, graph_kind) in README.read_text()


def test_every_family_with_a_fused_graph_is_tried() -> None:
    assert set(GRAPH_FAMILIES) <= {family.model_type for family in FAMILIES}


def test_the_readme_lists_no_other_family() -> None:
    text = README.read_text()
    if README_MARKS[0] not in text:
        pytest.skip("the README has no table of families")
    written = text[text.index(README_MARKS[0]) : text.index(README_MARKS[1])].strip().splitlines()
    assert len(written) == len(format_table(format_row(family, "") for family in FAMILIES).splitlines()) - 1


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("bloom", {"n_head": 2}, "no description of the architecture 'bloom'"),
        ("llama", {"hidden_act": "relu2"}, "activation 'relu2'"),
        ("phi3", {"rope_scaling": dict(type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8)}, "longrope"),
        ("opt", {"do_layer_norm_before": False}, "norms after each part"),
        ("opt", {"word_embed_proj_dim": 16}, "no place for model.decoder.project_in.weight"),
        ("phi", {"qk_layernorm": True}, "no place for model.layers.0.self_attn.k_layernorm"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
    ],
)
def test_an_unsupported_part_is_named(model_type: str, changes: dict[str, Any], why: str) -> None:
    config = AutoConfig.for_model(model_type, **SIZES | {"pad_token_id": 0} | changes)
    with pytest.raises(UnsupportedModel, match=why):
        decoder_from_model(AutoModelForCausalLM.from_config(config))


def test_a_parameter_that_is_not_read_is_named() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    model.model.layers[0].self_attn.gate = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedModel, match=r"no place for model\.layers\.0\.self_attn\.gate"):
        decoder_from_model(model)
