"""The table of precisions: what each stores, how far it is from PyTorch, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.parity import measure_parity
from limbeck.export.quantize.precisions import PRECISIONS
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import BadInput
from tests.export.export_helpers import (
    Exported,
    copy_with_graph,
    logits_of,
)

QUANTIZED = [precision for precision in PRECISIONS if precision != "fp32"]


@pytest.mark.parametrize("precision", QUANTIZED)
def test_every_precision_passes_parity_and_is_smaller(
    model_and_fp32: tuple[Path, Path], precision: str, tmp_path: Path
) -> None:
    torch, fp32 = model_and_fp32
    # The likeliest token of random weights changes often, so these limits are the test's own.
    settings = QuantizationSettings(max_change=0.02)
    export_onnx(torch, tmp_path / "out", precision, fp32_artifact=fp32, settings=settings)
    parity = measure_parity(torch, tmp_path / "out", max_documents=4, max_tokens=48, new_tokens=8)
    assert parity.passed
    assert parity.precision == precision
    assert 0 < parity.mean_kl < {"fp16": 1e-5, "int8-weight": 1e-3, "int4": 0.3}[precision]
    sizes = [(folder / "model.onnx").stat().st_size for folder in (tmp_path / "out", fp32)]
    assert sizes[0] < sizes[1]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["precision"] == precision
    assert manifest["quantization"]["requested"]["device"] == "cpu"
    assert [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_for_cuda_activations_of_int4_are_float16(llama: Exported, tmp_path: Path) -> None:
    export_onnx(
        llama.torch,
        tmp_path / "int4",
        "int4",
        fp32_artifact=llama.fp32,
        settings=QuantizationSettings(device="cuda", max_change=1e9),
    )
    graph = onnx.load(tmp_path / "int4/model.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert {attribute.i for node in products for attribute in node.attribute if attribute.name == "accuracy_level"} == {
        0
    }
    scales = {node.input[2] for node in products}
    assert {item.data_type for item in graph.initializer if item.name in scales} == {onnx.TensorProto.FLOAT16}
    assert np.isfinite(logits_of(tmp_path / "int4")).all()


def test_a_graph_without_constant_weights_is_refused(llama: Exported, tmp_path: Path) -> None:
    graph = onnx.load(llama.fp32 / "model.onnx")
    matrices = [item.name for item in graph.graph.initializer if len(item.dims) == 2]
    for node in graph.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = f"{name}/computed" if name in matrices else name
    for name in matrices:
        graph.graph.node.insert(0, onnx.helper.make_node("Identity", [name], [f"{name}/computed"]))
    artifact = copy_with_graph(llama.fp32, graph, tmp_path / "fp32")
    with pytest.raises(BadInput, match="no product with a constant weight to store in 4 bits"):
        export_onnx(llama.torch, tmp_path / "out", "int4", fp32_artifact=artifact)


def test_texts_without_tokens_are_refused(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no text to"):
        export_onnx(
            llama.torch, tmp_path / "out", "int4", fp32_artifact=llama.fp32, settings=QuantizationSettings(["", ""])
        )
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_precision_is_refused(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="use one of: fp32, fp16, int8-weight, int4"):
        export_onnx(llama.torch, tmp_path / "out", "int3")
