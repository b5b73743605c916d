"""Export of a checkpoint: the kind of graph, the files of the artifact, and what cannot be exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.parity import measure_parity
from limbeck.registry.core.digest import read_manifest, verify_files
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from tests.conftest import make_model
from tests.export.export_helpers import Exported
from tests.families import Family, make_checkpoint


def session(folder: Path) -> ort.InferenceSession:
    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def signature(folder: Path) -> list[tuple[str, str, list[Any]]]:
    graph = session(folder)
    return [(item.name, item.type, item.shape) for item in (*graph.get_inputs(), *graph.get_outputs())]


@pytest.fixture(scope="module")
def fused_artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "fp32"
    export_onnx(tiny_llama, folder)
    return folder


@pytest.fixture(scope="module")
def dynamic_rotary(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama whose rotary embedding the fused graph does not support; and its artifact."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = make_model(tmp_path_factory.mktemp("dynamic") / "torch", tokenizer_folder, "llama", rope_scaling=scaling)
    export_onnx(model, model.with_name("onnx"))
    return model, model.with_name("onnx")


def test_every_family_passes_parity_in_fp32(family: Exported) -> None:
    variant = family.variants[0]
    assert variant.precision == "fp32"
    assert variant.parity is not None
    assert variant.parity.passed
    assert variant.parity.greedy_identical
    assert variant.parity.max_logprob_diff < 1e-4
    assert variant.parity.tokens > 200
    assert variant.parity.bits_per_byte == pytest.approx(variant.parity.bits_per_byte_reference, abs=1e-5)


def test_int8_of_every_family_is_smaller_and_passes_parity(family: Exported) -> None:
    fp32, int8 = family.variants
    assert int8.precision == "int8"
    assert int8.parity is not None
    assert int8.parity.passed
    assert 1e-4 < int8.parity.max_logprob_diff < 2
    assert 0 < int8.parity.mean_kl < 0.05
    assert 0.5 < int8.parity.top1_agreement < 1
    weights = [(folder / "model.onnx").stat().st_size for folder in (family.int8, family.fp32)]
    assert weights[0] < weights[1]
    assert int8.digest != fp32.digest


def test_the_manifest_describes_the_artifact(llama: Exported) -> None:
    manifest = read_manifest(llama.int8)
    assert verify_files(llama.int8, manifest["digest"]) == llama.variants[1].digest
    assert (manifest["kind"], manifest["engine"], manifest["precision"]) == ("onnx", "onnxruntime", "int8")
    assert manifest["parity"]["reference"] == manifest["parent"]


def test_a_second_export_has_the_same_digest(llama: Exported, tmp_path: Path) -> None:
    again = [export_onnx(llama.torch, tmp_path / "fp32"), export_onnx(llama.torch, tmp_path / "int8", "int8")]
    assert again == [variant.digest for variant in llama.variants]


def test_graph_and_manifest_say_fused(fused_artifact: Path) -> None:
    assert session(fused_artifact).get_modelmeta().custom_metadata_map == {"limbeck.graph": "fused"}
    assert read_manifest(fused_artifact)["graph"] == "fused"


def test_a_model_without_a_fused_graph_gets_optimums(dynamic_rotary: tuple[Path, Path]) -> None:
    model, folder = dynamic_rotary
    assert read_manifest(folder)["graph"] == "optimum"
    assert session(folder).get_modelmeta().custom_metadata_map == {}
    assert measure_parity(model, folder, max_documents=2, max_tokens=32, new_tokens=4).passed


def test_both_graphs_have_the_same_inputs_and_outputs(fused_artifact: Path, dynamic_rotary: tuple[Path, Path]) -> None:
    assert signature(fused_artifact) == signature(dynamic_rotary[1])
    only_fused = {"genai_config.json"}
    assert {path.name for path in fused_artifact.iterdir()} - only_fused == {
        path.name for path in dynamic_rotary[1].iterdir()
    }


def test_a_quantized_variant_has_the_kind_of_graph_of_its_fp32_artifact(
    fused_artifact: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    export_onnx(tiny_llama, tmp_path / "int8", "int8", fp32_artifact=fused_artifact)
    assert read_manifest(tmp_path / "int8")["graph"] == "fused"


@pytest.fixture
def llama_copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def assert_refused(model: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        export_onnx(model, model.parent / "out")
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_an_unsupported_architecture_is_named_with_the_supported_ones(llama_copy: Path) -> None:
    config = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(
        json.dumps(config | {"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]})
    )
    assert_refused(llama_copy, BadInput, r"the architecture 'rwkv' cannot be exported\n  supported: .*llama")


def test_pickled_weights_are_refused(llama_copy: Path) -> None:
    (llama_copy / "model.safetensors").rename(llama_copy / "pytorch_model.bin")
    assert_refused(llama_copy, BadInput, "pickle")


def test_truncated_weights_are_reported_as_damage(llama_copy: Path) -> None:
    weights = llama_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(llama_copy, DamagedArtifact, r"model\.safetensors")


def test_a_folder_without_a_tokenizer_is_refused(llama_copy: Path) -> None:
    for path in llama_copy.glob("*token*"):
        path.unlink()
    assert_refused(llama_copy, BadInput, "tokenizer cannot be read")


def test_an_artifact_is_not_exported_again(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is an ONNX artifact"):
        export_onnx(llama.fp32, tmp_path / "out")


def test_the_fp32_artifact_of_another_model_is_refused(llama: Exported, tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not an export of"):
        export_onnx(tiny_gpt2, tmp_path / "out", "int8", fp32_artifact=llama.fp32)


def test_a_model_that_optimum_fails_on_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    config = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_kv_heads=1, new_decoder_architecture=True
    )
    model = make_checkpoint(Family("Falcon 40B", "falcon", config), tokenizer_folder, tmp_path / "torch")
    with pytest.raises(BadInput, match="optimum cannot export this falcon model"):
        export_onnx(model, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
