"""`export` with the fused graph: what is written, and what gets optimum's graph instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.parity import measure_parity
from limbeck.export.graph import save
from limbeck.export.graph.families import decoder_from_model
from limbeck.export.graph.reader import UnsupportedModel
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import BadInput
from tests.conftest import make_model
from tests.families import Family, checkpoint

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=128, vocab_size=300)  # fmt: skip


def session(folder: Path) -> ort.InferenceSession:
    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def signature(folder: Path) -> list[tuple[str, str, list[Any]]]:
    graph = session(folder)
    return [(item.name, item.type, item.shape) for item in (*graph.get_inputs(), *graph.get_outputs())]


@pytest.fixture(scope="module")
def fused(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "fp32"
    export_onnx(tiny_llama, folder)
    return folder


@pytest.fixture(scope="module")
def dynamic(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of a family that can be written, but for its rotary embedding; and its artifact."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = make_model(tmp_path_factory.mktemp("dynamic") / "torch", tokenizer_folder, "llama", rope_scaling=scaling)
    export_onnx(model, model.with_name("onnx"))
    return model, model.with_name("onnx")


def test_the_graph_says_that_it_is_fused(fused: Path) -> None:
    assert session(fused).get_modelmeta().custom_metadata_map == {"limbeck.graph": "fused"}
    assert read_manifest(fused)["graph"] == "fused"


def test_a_graph_made_again_has_the_same_bytes(fused: Path, tiny_llama: Path, tmp_path: Path) -> None:
    export_onnx(tiny_llama, tmp_path / "again")
    assert (tmp_path / "again/model.onnx").read_bytes() == (fused / "model.onnx").read_bytes()


def test_a_member_that_cannot_be_written_gets_optimums_graph(dynamic: tuple[Path, Path]) -> None:
    model, folder = dynamic
    assert read_manifest(folder)["graph"] == "optimum"
    assert session(folder).get_modelmeta().custom_metadata_map == {}
    assert measure_parity(model, folder, max_documents=2, max_tokens=32, new_tokens=4).passed


def test_both_graphs_have_the_same_inputs_and_outputs(fused: Path, dynamic: tuple[Path, Path]) -> None:
    assert signature(fused) == signature(dynamic[1])
    only_fused = {"genai_config.json"}
    assert {path.name for path in fused.iterdir()} - only_fused == {path.name for path in dynamic[1].iterdir()}


def test_a_quantised_variant_has_the_graph_it_is_made_from(fused: Path, tiny_llama: Path, tmp_path: Path) -> None:
    export_onnx(tiny_llama, tmp_path / "int8", "int8", fp32_artifact=fused)
    assert read_manifest(tmp_path / "int8")["graph"] == "fused"


def test_large_weights_lie_in_a_file_of_their_own(
    fused: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "MAX_SINGLE_FILE_BYTES", 1000)
    export_onnx(tiny_llama, tmp_path / "fp32")
    assert (tmp_path / "fp32/model.onnx_data").stat().st_size > 50_000
    assert "model.onnx_data" in read_manifest(tmp_path / "fp32")["files"]
    feed = {"input_ids": np.array([[5, 9]]), "attention_mask": np.array([[1, 1]]), "position_ids": np.array([[0, 1]])}
    feed |= {name: np.zeros((1, 2, 0, 8), np.float32) for name, _, _ in signature(fused) if name.startswith("past")}
    one, other = (session(folder).run(["logits"], feed)[0] for folder in (fused, tmp_path / "fp32"))
    assert np.array_equal(one, other)


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
def test_a_part_without_a_place_is_named(model_type: str, changes: dict[str, Any], why: str) -> None:
    config = AutoConfig.for_model(model_type, **SIZES | {"pad_token_id": 0} | changes)
    with pytest.raises(UnsupportedModel, match=why):
        decoder_from_model(AutoModelForCausalLM.from_config(config))


def test_a_parameter_that_nobody_reads_is_noticed() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    model.model.layers[0].self_attn.gate = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedModel, match=r"no place for model\.layers\.0\.self_attn\.gate"):
        decoder_from_model(model)


def test_a_model_that_optimum_trips_over_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    config = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_kv_heads=1, new_decoder_architecture=True
    )
    model = checkpoint(Family("Falcon 40B", "falcon", config), tokenizer_folder, tmp_path / "torch")
    with pytest.raises(BadInput, match="optimum cannot export this falcon model"):
        export_onnx(model, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
