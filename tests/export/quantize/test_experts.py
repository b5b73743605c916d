"""Experts in blocks of 4 or 8 bits, and tables of tokens beside the embedding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from limbeck.export.artifact.export import export_onnx
from limbeck.export.quantize.blocks.formats import BlockFormat
from limbeck.export.quantize.weight_only import GraphWeights
from limbeck.registry.core.errors import BadInput
from tests.conftest import make_model
from tests.export.export_helpers import copy_with_graph, logits_of


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The float32 artifact of a mixture of experts of 32 and 48 inputs."""
    folder = tmp_path_factory.mktemp("mixture")
    export_onnx(make_model(folder / "torch", tokenizer_folder, "qwen3_moe"), folder / "fp32")
    return folder / "fp32"


def dequantize(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """Codes and zero points of 4 bits (E, N, bytes) -> (E, N, K) float32, by the definition of QMoE."""
    values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, -1).astype(np.float32)
    zero = np.full(scales.shape, 8.0, np.float32)
    if zeros is not None:
        pairs = np.stack([zeros & 15, zeros >> 4], axis=-1)
        zero = pairs.reshape(*zeros.shape[:2], -1)[..., : scales.shape[2]].astype(np.float32)
    return ((values - zero[..., None]) * scales[..., None]).reshape(*scales.shape[:2], -1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_quantized_experts_compute_with_the_dequantized_weights(
    mixture: Path, symmetric: bool, tmp_path: Path
) -> None:
    weights = GraphWeights.from_graph(mixture / "model.onnx")
    experts = [name for name in weights.groups if name.endswith("experts")]
    blocks = BlockFormat(4, 64, symmetric, accuracy_level=0)  # 64 does not divide 48 inputs: 16 does
    graph = weights.quantize(dict.fromkeys(experts, blocks))
    stored = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
    plain = onnx.load(mixture / "model.onnx")
    for item in plain.graph.initializer:
        if ".experts." in item.name:
            parts = [stored.get(f"{item.name}_4bits{suffix}") for suffix in ("", "_scales", "_zeros")]
            assert parts[1].shape[2] == item.dims[2] // 16
            assert (parts[2] is None) == symmetric
            item.CopyFrom(numpy_helper.from_array(dequantize(*parts), item.name))
    quantized = logits_of(copy_with_graph(mixture, graph, tmp_path / "quantized"))
    assert np.abs(quantized - logits_of(mixture)).max() > 1e-3
    np.testing.assert_allclose(quantized, logits_of(copy_with_graph(mixture, plain, tmp_path / "plain")), atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_only_routers_and_norms_stay_float32(mixture: Path, bits: int) -> None:
    weights = GraphWeights.from_graph(mixture / "model.onnx")
    graph = weights.quantize(dict.fromkeys(weights.groups, BlockFormat(bits, 32))).graph
    ops = Counter(node.op_type for node in graph.node)
    assert (ops["QMoE"], ops["MoE"], ops["MatMul"]) == (2, 0, 0)
    large = [item.name for item in graph.initializer if item.data_type == 1 and len(item.dims) > 1]
    assert [name for name in large if not name.endswith(("scales", ".cos", ".sin", "mlp.gate.weight"))] == []


def test_experts_that_no_block_divides_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    export_onnx(make_model(tmp_path / "torch", tokenizer_folder, "qwen3_moe", moe_intermediate_size=40), tmp_path / "o")
    weights = GraphWeights.from_graph(tmp_path / "o" / "model.onnx")
    with pytest.raises(BadInput, match=r"layers\.0\.experts: experts of 32 and 40 inputs"):
        weights.quantize(dict.fromkeys(weights.groups, BlockFormat(4, 32)))


def test_the_inputs_of_the_layers_are_quantized_too(tmp_path: Path, tokenizer_folder: Path) -> None:
    export_onnx(make_model(tmp_path / "torch", tokenizer_folder, "gemma4_text"), tmp_path / "fp32")
    weights = GraphWeights.from_graph(tmp_path / "fp32" / "model.onnx")
    graph = weights.quantize(dict.fromkeys(weights.groups, BlockFormat(4, 32))).graph
    tables = {item.name: item.data_type for item in graph.initializer if item.dims and item.dims[0] == 300}
    kinds = [kind for name, kind in tables.items() if "scale" not in name and "zeros" not in name]
    assert len(kinds) == 2
    assert onnx.TensorProto.FLOAT not in kinds
