"""Export: the families, parity, and what cannot be exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from limbeck.export.artifact import variants
from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.parity import measure_parity
from limbeck.export.artifact.variants import ExportOptions, export_folder, export_version
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.digest import read_manifest, verify_files
from limbeck.registry.core.errors import BadInput, DamagedArtifact, Refused
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.export.export_helpers import Exported, corrupt_one_weight


def test_every_family_passes_parity_in_fp32(family: Exported) -> None:
    variant = family.variants[0]
    assert variant.precision == "fp32"
    assert variant.parity is not None
    assert variant.parity.passed
    assert variant.parity.greedy_identical
    assert variant.parity.max_logprob_diff < 1e-4
    assert variant.parity.tokens > 200
    assert variant.parity.bits_per_byte == pytest.approx(variant.parity.bits_per_byte_reference, abs=1e-5)


def test_every_family_in_int8_is_smaller_and_its_difference_is_reported(family: Exported) -> None:
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


def test_an_artifact_is_what_its_manifest_says(llama: Exported) -> None:
    manifest = read_manifest(llama.int8)
    assert verify_files(llama.int8, manifest["digest"]) == llama.variants[1].digest
    assert (manifest["kind"], manifest["engine"], manifest["precision"]) == ("onnx", "onnxruntime", "int8")
    assert manifest["parity"]["reference"] == manifest["parent"]


def test_an_export_made_again_has_the_same_digest(llama: Exported, tmp_path: Path) -> None:
    again = [export_onnx(llama.torch, tmp_path / "fp32"), export_onnx(llama.torch, tmp_path / "int8", "int8")]
    assert again == [variant.digest for variant in llama.variants]


def test_a_changed_weight_fails_parity(llama: Exported, tmp_path: Path) -> None:
    shutil.copytree(llama.fp32, tmp_path / "fp32")
    corrupt_one_weight(tmp_path / "fp32")
    parity = measure_parity(llama.torch, tmp_path / "fp32")
    assert not parity.passed
    assert parity.max_logprob_diff > 1e-3


def test_a_graph_that_answers_otherwise_is_refused_and_not_kept(
    llama: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Path, out: Path, *args: object, **kwargs: object) -> None:
        shutil.copytree(llama.fp32, out)
        corrupt_one_weight(out)

    monkeypatch.setattr(variants, "export_onnx", broken)
    with pytest.raises(Refused, match="largest difference in log-probability") as refused:
        export_folder(llama.torch, tmp_path / "to", ["fp32", "int8"])
    assert refused.value.exit_code == 1
    assert list((tmp_path / "to").iterdir()) == []


def test_another_tokenizer_is_refused(llama: Exported, tmp_path: Path) -> None:
    shutil.copytree(llama.fp32, tmp_path / "fp32")
    tokenizer = json.loads((tmp_path / "fp32/tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "fp32/tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "fp32/limbeck.json").unlink()
    with pytest.raises(Refused, match="splits a text differently"):
        measure_parity(llama.torch, tmp_path / "fp32")


def test_what_is_there_is_not_made_again(llama: Exported) -> None:
    told: list[str] = []
    again = export_folder(
        llama.torch,
        llama.fp32.parent,
        ["fp32", "int8"],
        ExportOptions(quantization=QuantizationSettings(report=told.append)),
    )
    assert [variant.new for variant in again] == [False, False]
    assert [variant.digest for variant in again] == [variant.digest for variant in llama.variants]
    assert all("already exported" in line for line in told)


def test_another_model_takes_the_place_of_an_older_export(llama: Exported, tiny_gpt2: Path, tmp_path: Path) -> None:
    shutil.copytree(llama.fp32, tmp_path / "fp32")
    (made,) = export_folder(tiny_gpt2, tmp_path, ["fp32"])
    assert made.new
    assert Runtime.load(tmp_path / "fp32", expected_digest=made.digest).config["model_type"] == "gpt2"


def test_a_folder_of_something_else_is_left_alone(llama: Exported, tmp_path: Path) -> None:
    (tmp_path / "fp32").mkdir()
    (tmp_path / "fp32/thesis.txt").write_text("three years of work")
    with pytest.raises(BadInput, match="holds something else"):
        export_folder(llama.torch, tmp_path, ["fp32"])
    assert (tmp_path / "fp32/thesis.txt").read_text() == "three years of work"


def test_variants_of_a_version_are_registered_once_with_lineage_and_parity(
    store: Store, tiny_llama: Path, limbeck_home: Path
) -> None:
    teacher = store.register(NewVersion(name="coder", kind="teacher", licence="MIT", params=12), tiny_llama)
    made = export_version(store, teacher, ["int8", "fp32"])
    assert [variant.model for variant in made] == ["coder/2", "coder/3"]
    version = store.get("coder/3")
    assert (version.kind, version.engine, version.precision) == ("onnx", "onnxruntime", "int8")
    assert (version.parent, version.licence, version.params) == ("coder/1", "MIT", 12)
    assert store.findings.parity(version) == made[1].parity
    assert read_manifest(store.artifacts.verified_folder(version))["lineage"]["model"] == "coder/1"
    again = export_version(store, teacher, ["fp32", "int8"])
    assert [(variant.model, variant.new) for variant in again] == [("coder/2", False), ("coder/3", False)]
    assert len(store.versions("coder")) == 3
    assert not list(limbeck_home.glob("export-*"))


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def refused(model: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        export_onnx(model, model.parent / "out")
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_an_architecture_without_an_exporter_is_named_with_those_that_have_one(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}))
    refused(copy, BadInput, r"the architecture 'rwkv' cannot be exported\n  supported: .*llama")


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, BadInput, "pickle")


def test_truncated_weights_are_damage(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(copy, DamagedArtifact, r"model\.safetensors")


def test_a_folder_without_a_tokenizer_is_refused(copy: Path) -> None:
    for path in copy.glob("*token*"):
        path.unlink()
    refused(copy, BadInput, "tokenizer cannot be read")


def test_an_artifact_is_not_exported_again(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is an ONNX artifact"):
        export_onnx(llama.fp32, tmp_path / "out")


def test_an_unknown_precision_is_refused(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="use one of: fp32, fp16, int8"):
        export_onnx(llama.torch, tmp_path / "out", "int3")


def test_a_quantised_graph_is_not_made_from_another_models_fp32(
    llama: Exported, tiny_gpt2: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="is not an export of"):
        export_onnx(tiny_gpt2, tmp_path / "out", "int8", fp32_artifact=llama.fp32)
