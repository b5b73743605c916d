"""Weights in blocks of 4 or 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from limbeck.export.quantize.blocks.formats import BlockFormat
from limbeck.export.quantize.weight_only import GraphWeights
from tests.export.export_helpers import (
    Exported,
    copy_with_graph,
    logits_of,
)


def dequantize(weights: GraphWeights, weight: str, blocks: BlockFormat) -> np.ndarray:
    """Dequantize a weight to (in, out) float32, by the definition of MatMulNBits."""
    product = next(item for item in weights.weight_nodes if item.weight == weight)
    codes, scales, packed, _ = weights.pack(product, blocks)
    if blocks.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    zero = np.full(scales.shape, 2 ** (blocks.bits - 1), np.float32)
    if packed is not None:
        if blocks.bits == 4:
            packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)[:, : scales.shape[1]]
        zero = packed.reshape(scales.shape).astype(np.float32)
    values = (codes.astype(np.float32) - zero[..., None]) * scales[..., None]
    return values.reshape(len(values), -1)[:, : product.inputs].T


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_quantized_graph_computes_with_the_dequantized_weights(
    model_and_fp32: tuple[Path, Path], bits: int, symmetric: bool, tmp_path: Path
) -> None:
    blocks = BlockFormat(bits, 32, symmetric, accuracy_level=0)
    weights = GraphWeights.from_graph(model_and_fp32[1] / "model.onnx")
    quantized = copy_with_graph(
        model_and_fp32[1], weights.quantize(dict.fromkeys(weights.groups, blocks)), tmp_path / "quantize"
    )
    plain = onnx.load(model_and_fp32[1] / "model.onnx")
    by_name = {product.weight: product for product in weights.weight_nodes}
    for tensor in plain.graph.initializer:
        if tensor.name in by_name:
            values = dequantize(weights, tensor.name, blocks)
            oriented = values.T if by_name[tensor.name].outputs_first or values.shape != tuple(tensor.dims) else values
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(oriented.reshape(tensor.dims)), tensor.name))
    reference = copy_with_graph(model_and_fp32[1], plain, tmp_path / "plain")
    assert np.abs(logits_of(quantized) - logits_of(model_and_fp32[1])).max() > 1e-3
    np.testing.assert_allclose(logits_of(quantized), logits_of(reference), atol=2e-4)


def test_every_weight_is_quantized_and_a_tied_table_is_stored_once(llama: Exported) -> None:
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")
    graph = weights.quantize(dict.fromkeys(weights.groups, BlockFormat(4, 32))).graph
    ops = [node.op_type for node in graph.node]
    assert "MatMul" not in ops
    assert "FusedMatMul" not in ops
    assert "Gather" not in ops
    assert ops.count("GatherBlockQuantized") == 1
    vocabulary = [item for item in graph.initializer if item.dims and item.dims[0] == 300 and item.data_type == 2]
    assert sum(len(item.raw_data) for item in vocabulary) == 300 * 32 // 2 + 300  # codes and zero points
    large = [item.name for item in graph.initializer if item.data_type == 1 and np.prod(item.dims) >= 32 * 32]
    assert [name for name in large if "scales" not in name and "rotary" not in name] == []


def test_a_table_whose_width_no_block_size_divides_stays_float32(llama: Exported) -> None:
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")
    product = next(item for item in weights.weight_nodes if item.weight == weights.embedding)
    assert weights.format_for(product, BlockFormat(4, 128)) == BlockFormat(4, 32)  # 32 wide
    odd = type(product)(product.output_name, product.weight, True, 40, product.outputs, product.group)
    assert weights.format_for(odd, BlockFormat(4, 128)) is None
