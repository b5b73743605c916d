"""The variants of a model, in a folder or the registry: made once, checked, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from limbeck.export.artifact import variants
from limbeck.export.artifact.variants import ExportOptions, export_folder, export_version
from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.digest import extra_manifest_fields, read_manifest, write_manifest
from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.export.export_helpers import Exported, corrupt_one_weight, rewrite_manifest


def test_a_graph_that_fails_parity_is_refused_and_not_stored(
    llama: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_broken_graph(model: Path, out: Path, *args: object, **kwargs: object) -> None:
        shutil.copytree(llama.fp32, out)
        corrupt_one_weight(out)

    monkeypatch.setattr(variants, "export_onnx", export_broken_graph)
    with pytest.raises(Refused, match="largest difference in log-probability") as refused:
        export_folder(llama.torch, tmp_path / "to", ["fp32", "int8-weight"])
    assert refused.value.exit_code == 1
    assert list((tmp_path / "to").iterdir()) == []


def test_existing_variants_are_not_made_again(llama: Exported) -> None:
    lines: list[str] = []
    again = export_folder(
        llama.torch,
        llama.fp32.parent,
        ["fp32", "int8-weight"],
        ExportOptions(quantization=QuantizationSettings(report=lines.append)),
    )
    assert [variant.new for variant in again] == [False, False]
    assert [variant.digest for variant in again] == [variant.digest for variant in llama.variants]
    assert all("already exported" in line for line in lines)


@pytest.fixture
def other_graph(llama: Exported, optimum_artifact: Callable[[Path], Path], tmp_path: Path) -> Path:
    """A folder with the fp32 variant of the tiny Llama, with optimum's graph."""
    fields = extra_manifest_fields(read_manifest(llama.fp32)) | {"graph": "optimum"}
    write_manifest(shutil.copytree(optimum_artifact(llama.torch), tmp_path / "fp32"), **fields)
    return tmp_path


def test_an_existing_variant_of_another_engine_is_replaced_on_request(llama: Exported, other_graph: Path) -> None:
    (existing,) = export_folder(llama.torch, other_graph, ["fp32"])
    assert (existing.new, existing.graph) == (False, "optimum")
    (fused,) = export_folder(llama.torch, other_graph, ["fp32"], ExportOptions(engine="fused"))
    assert (fused.new, fused.graph, fused.digest) == (True, "fused", llama.variants[0].digest)


def test_a_quantized_variant_is_made_from_the_graph_of_the_requested_engine(llama: Exported, other_graph: Path) -> None:
    (int8,) = export_folder(llama.torch, other_graph, ["int8-weight"], ExportOptions(engine="fused"))
    assert (int8.graph, int8.digest) == ("fused", llama.variants[1].digest)
    assert read_manifest(other_graph / "fp32")["graph"] == "optimum"


def test_the_export_of_another_model_is_replaced(llama: Exported, tiny_gpt2: Path, tmp_path: Path) -> None:
    shutil.copytree(llama.fp32, tmp_path / "fp32")
    (made,) = export_folder(tiny_gpt2, tmp_path, ["fp32"])
    assert made.new
    assert Runtime.load(tmp_path / "fp32", expected_digest=made.digest).config["model_type"] == "gpt2"


def test_a_folder_with_other_files_is_left_alone(llama: Exported, tmp_path: Path) -> None:
    (tmp_path / "fp32").mkdir()
    (tmp_path / "fp32/thesis.txt").write_text("three years of work")
    with pytest.raises(BadInput, match="holds something else"):
        export_folder(llama.torch, tmp_path, ["fp32"])
    assert (tmp_path / "fp32/thesis.txt").read_text() == "three years of work"


def test_variants_of_a_version_are_registered_once_with_lineage_and_parity(
    store: Store, tiny_llama: Path, limbeck_home: Path
) -> None:
    teacher = store.register(NewVersion(name="coder", kind="teacher", licence="MIT", params=12), tiny_llama)
    made = export_version(store, teacher, ["int8-weight", "fp32"])
    assert [variant.model for variant in made] == ["coder/2", "coder/3"]
    version = store.get("coder/3")
    assert (version.kind, version.engine, version.precision) == ("onnx", "onnxruntime", "int8-weight")
    assert (version.parent, version.licence, version.params) == ("coder/1", "MIT", 12)
    assert store.findings.parity(version) == made[1].parity
    assert read_manifest(store.artifacts.verified_folder(version))["lineage"]["model"] == "coder/1"
    again = export_version(store, teacher, ["fp32", "int8-weight"])
    assert [(variant.model, variant.new) for variant in again] == [("coder/2", False), ("coder/3", False)]
    assert len(store.versions("coder")) == 3
    assert not list(limbeck_home.glob("export-*"))


def test_a_quantized_variant_is_made_again_if_its_limit_changes(llama: Exported, tmp_path: Path) -> None:
    lines: list[str] = []
    shutil.copytree(llama.fp32, tmp_path / "fp32")
    for max_change, new in ((1e9, True), (1e9, False), (1e-2, True)):
        settings = QuantizationSettings(max_change=max_change, report=lines.append)
        (made,) = export_folder(llama.torch, tmp_path, ["int4"], ExportOptions(SAMPLE_TEXTS[:2], settings))
        assert made.new is new
        assert made.parity.max_change == max_change
    assert not any("fp32: exporting" in line for line in lines)


def test_a_variant_above_the_limits_is_refused_or_kept_and_marked(llama: Exported, tmp_path: Path) -> None:
    """Logits of random weights are nearly equal, so 4 bits change the likeliest token more often than is allowed.

    Calibrated on two words, that is.
    """
    shutil.copytree(llama.fp32, tmp_path / "fp32")
    words = QuantizationSettings(texts=("two words",))
    with pytest.raises(
        Refused, match=r"int4: too far from PyTorch.* top-1 agreement .*% \[.*\] \(at least 80"
    ) as error:
        export_folder(llama.torch, tmp_path, ["int4"], ExportOptions(SAMPLE_TEXTS, words))
    assert error.value.exit_code == 1
    assert "--max-change" in str(error.value.fix)
    assert [path.name for path in tmp_path.iterdir()] == ["fp32"]
    own = ExportOptions(SAMPLE_TEXTS, replace(words, max_change=0.02))
    (kept,) = export_folder(llama.torch, tmp_path, ["int4"], own)
    assert kept.parity.passed
    assert kept.parity.is_above_limits
    assert "top1_agreement" in read_manifest(tmp_path / "int4")["parity"]["exceeded"]
    own = ExportOptions(SAMPLE_TEXTS, replace(words, max_change=-0.5))
    with pytest.raises(Refused, match=r"bits per byte .* \(at most -50.00%\)"):
        export_folder(llama.torch, tmp_path, ["int4"], own)


def test_an_operator_without_a_kernel_is_named(
    llama: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_unknown_operator(model: Path, out: Path, precision: str, **_: object) -> None:
        shutil.copytree(llama.fp32, out)
        graph = onnx.load(out / "model.onnx")
        node = next(node for node in graph.graph.node if node.op_type == "QuickGelu")
        node.op_type = "Rfft"  # for CUDA only
        del node.attribute[:]
        node.attribute.extend(
            onnx.helper.make_attribute(name, value)
            for name, value in (("signal_ndim", 1), ("normalized", 0), ("onesided", 1))
        )
        onnx.save_model(graph, out / "model.onnx")
        rewrite_manifest(out)

    monkeypatch.setattr("limbeck.export.artifact.variants.export_onnx", export_unknown_operator)
    with pytest.raises(BadInput, match=r"fp32: onnxruntime has no kernel for the operator Rfft"):
        export_folder(llama.torch, tmp_path / "to", ["fp32"])
