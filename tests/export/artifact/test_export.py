"""Export of a checkpoint: the kind of graph, the files of the artifact, and what cannot be exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.variants import ExportOptions, Variant, export_folder
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.digest import read_manifest, verify_files
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.overlay import overlay_versions
from tests.conftest import make_model
from tests.export.export_helpers import Exported
from tests.families import FAMILIES, Family, make_checkpoint


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
def odd_heads(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama without a fused graph: onnxruntime's attention does not take heads of 12."""
    return make_model(tmp_path_factory.mktemp("odd") / "torch", tokenizer_folder, "llama", hidden_size=48)


class Fallback(NamedTuple):
    """An export that optimum's graph was taken for, and the lines that it reported."""

    variant: Variant
    folder: Path
    lines: list[str]


@pytest.fixture(scope="module")
def fallback(odd_heads: Path) -> Fallback:
    """The fp32 variant of a model without a fused graph."""
    lines: list[str] = []
    options = ExportOptions(quantization=QuantizationSettings(report=lines.append))
    folder = odd_heads.with_name("onnx")
    return Fallback(export_folder(odd_heads, folder, ["fp32"], options)[0], folder / "fp32", lines)


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
    assert int8.precision == "int8-weight"
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
    assert (manifest["kind"], manifest["engine"], manifest["precision"]) == ("onnx", "onnxruntime", "int8-weight")
    assert manifest["parity"]["reference"] == manifest["parent"]


def test_a_second_export_has_the_same_digest(llama: Exported, tmp_path: Path) -> None:
    again = [
        export_onnx(llama.torch, tmp_path / "fp32"),
        export_onnx(llama.torch, tmp_path / "int8-weight", "int8-weight"),
    ]
    assert again == [variant.digest for variant in llama.variants]


def test_graph_and_manifest_say_fused(fused_artifact: Path) -> None:
    assert session(fused_artifact).get_modelmeta().custom_metadata_map == {
        "limbeck.graph": "fused",
        "limbeck.logits": "position_ids",
    }
    assert read_manifest(fused_artifact)["graph"] == "fused"


def test_a_model_without_a_fused_graph_gets_optimums_with_the_reason(fallback: Fallback) -> None:
    manifest, reported = read_manifest(fallback.folder), fallback.variant.to_json()
    assert manifest["graph"] == reported["graph"] == "optimum"
    assert "head size of 12" in manifest["graph_reason"]
    assert manifest["graph_reason"] == reported["graph_reason"]
    assert any(line.endswith(f"no fused one: {manifest['graph_reason']}") for line in fallback.lines)
    assert session(fallback.folder).get_modelmeta().custom_metadata_map == {}
    assert reported["parity"]["max_logprob_diff"] < 1e-5
    assert manifest["made_with"]["optimum-onnx"] == overlay_versions()["optimum-onnx"]


def test_a_fused_graph_has_no_reason_and_was_not_made_with_optimum(fused_artifact: Path) -> None:
    manifest = read_manifest(fused_artifact)
    assert "graph_reason" not in manifest
    assert set(manifest["made_with"]) == {"onnx", "onnxruntime", "torch", "transformers"}


def test_both_graphs_have_the_same_inputs_and_outputs(
    tiny_llama: Path, fused_artifact: Path, optimum_artifact: Callable[[Path], Path]
) -> None:
    optimum = optimum_artifact(tiny_llama)
    assert signature(fused_artifact) == signature(optimum)
    only_fused = {"genai_config.json"}
    assert {path.name for path in fused_artifact.iterdir()} - only_fused == {path.name for path in optimum.iterdir()}


def test_an_artifact_takes_texts_up_to_the_length_that_its_graph_is_right_for(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    family = next(family for family in FAMILIES if "longrope" in family.note)
    export_onnx(make_checkpoint(family, tokenizer_folder, tmp_path / "torch"), tmp_path / "onnx")
    original = family.config["rope_parameters"]["original_max_position_embeddings"]
    assert original < family.config["max_position_embeddings"]
    runtime = Runtime.load(tmp_path / "onnx", threads=1)
    assert runtime.max_length == original
    runtime.logits(np.ones((1, original), np.int64), np.ones((1, original), np.int64))
    [completion] = runtime.generate([[1] * (original - 2)], max_new_tokens=9)
    assert len(completion.token_ids) <= 2


def test_other_programs_know_the_class_of_the_tokenizer(fused_artifact: Path, tiny_llama: Path) -> None:
    """Transformers 4 does not know the class that transformers 5 writes."""
    classes = [
        json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
        for folder in (tiny_llama, fused_artifact)
    ]
    assert classes == ["TokenizersBackend", "PreTrainedTokenizerFast"]


def test_an_engine_that_cannot_make_the_graph_is_refused(
    odd_heads: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"has no fused graph: .*head size of 12.*\n  use --engine optimum"):
        export_onnx(odd_heads, tmp_path / "out", engine="fused")
    config = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = make_checkpoint(Family("", "seed_oss", config), tokenizer_folder, tmp_path / "seed")
    with pytest.raises(BadInput, match=r"optimum does not know 'seed_oss'\n  leave --engine out"):
        export_onnx(model, tmp_path / "out", engine="optimum")
    assert not (tmp_path / "out").exists()


def test_a_quantized_variant_has_the_kind_of_graph_of_its_fp32_artifact(
    fused_artifact: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    export_onnx(tiny_llama, tmp_path / "int8-weight", "int8-weight", fp32_artifact=fused_artifact)
    assert read_manifest(tmp_path / "int8-weight")["graph"] == "fused"


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
    assert_refused(llama_copy, BadInput, "has no tokenizer")


def test_an_artifact_is_not_exported_again(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is an ONNX artifact"):
        export_onnx(llama.fp32, tmp_path / "out")


def test_the_fp32_artifact_of_another_model_is_refused(llama: Exported, tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not an export of"):
        export_onnx(tiny_gpt2, tmp_path / "out", "int8-weight", fp32_artifact=llama.fp32)


def test_the_fp32_artifact_of_another_engine_is_refused(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has the graph of the engine fused, not optimum"):
        export_onnx(llama.torch, tmp_path / "out", "int8-weight", fp32_artifact=llama.fp32, engine="optimum")
