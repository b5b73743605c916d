"""Blocks of weights that were quantized before, found in their values."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType as Type
from onnx import numpy_helper

from limbeck.export.quantize.blocks.carried import find_grid
from limbeck.export.quantize.blocks.formats import BlockFormat
from limbeck.export.quantize.weight_only import GraphWeights
from tests.export.export_helpers import Exported, copy_with_graph, logits_of


def through_gguf(weight: np.ndarray, kind: Type) -> np.ndarray:
    """The (K, N) weight after gguf quantized and dequantized its (N, K) transpose."""
    rows = np.ascontiguousarray(weight.T, np.float32)
    return np.ascontiguousarray(gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind).T)


def random_weight(inputs: int = 96, outputs: int = 80) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((inputs, outputs)).astype(np.float32) / 7


@pytest.mark.parametrize(("kind", "bits"), [(Type.Q4_0, 4), (Type.Q4_1, 4), (Type.Q8_0, 8)])
def test_the_blocks_of_gguf_are_found_exactly(kind: Type, bits: int) -> None:
    weight = random_weight()
    weight[:32, 0] = 0
    weight[32:64, 1] = 0.25
    weight[:, 2] *= 1e-3
    values = through_gguf(weight, kind)
    found = find_grid(values, bits)
    assert found is not None
    codes, grid = found
    assert (grid.minima is not None) == (kind == Type.Q4_1)
    np.testing.assert_allclose(grid.values(codes), values, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(grid.scales.astype(np.float16).astype(np.float32), grid.scales)


def test_integer_zero_points_need_no_minima() -> None:
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (64, 8)), rng.integers(0, 16, (2, 1, 8))
    values = (codes.reshape(2, 32, 8) - zeros).reshape(64, 8).astype(np.float32) * np.float32(0.01)
    found = find_grid(values, 4)
    assert found is not None
    assert found[1].minima is None
    np.testing.assert_allclose(found[1].values(found[0]), values, atol=1e-8)


@pytest.mark.parametrize("bits", [4, 8])
def test_float_weights_are_on_no_levels(bits: int) -> None:
    weight = random_weight()
    assert find_grid(weight, bits) is None
    assert find_grid(weight.astype(np.float16).astype(np.float32), bits) is None
    almost = through_gguf(weight, Type.Q4_1 if bits == 4 else Type.Q8_0)
    almost[40, 77] += 0.01
    assert find_grid(almost, bits) is None
    assert find_grid(weight[:40], bits) is None


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_int4_keeps_the_blocks_of_a_dequantized_model(llama: Exported, tmp_path: Path, kind: Type) -> None:
    model = onnx.load(llama.fp32 / "model.onnx")
    products = {product.weight for product in GraphWeights.from_graph(llama.fp32 / "model.onnx").weight_nodes}
    for tensor in model.graph.initializer:
        if tensor.name in products:
            is_table = "embed" in tensor.name  # its rows are outputs; llama.cpp gives it more bits, too
            weight = numpy_helper.to_array(tensor)
            weight = through_gguf(weight.T, Type.Q8_0).T if is_table else through_gguf(weight, kind)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight), tensor.name))
    fp32 = copy_with_graph(llama.fp32, model, tmp_path / "fp32")
    weights = GraphWeights.from_graph(fp32 / "model.onnx")
    counts = weights.carry_over(4)
    assert counts["rounded"] == 0
    assert counts["4 bits"] == (0 if kind == Type.Q8_0 else len(products) - 1)
    exact, fast = (
        copy_with_graph(fp32, weights.quantize(dict.fromkeys(weights.groups, BlockFormat(4, 32, False, level))), folder)
        for level, folder in ((0, tmp_path / "exact"), (4, tmp_path / "fast"))
    )
    reference = logits_of(fp32)
    np.testing.assert_allclose(logits_of(exact), reference, atol=2e-5 * np.abs(reference).max())
    assert np.abs(logits_of(fast) - reference).max() < 0.05 * np.abs(reference).max()  # int8 activations
    halves = {item.name for item in onnx.load(fast / "model.onnx").graph.initializer if item.data_type == 10}
    assert sum("scales" in name for name in halves) == len(products)
    assert any("minima" in name for name in halves) == (kind == Type.Q4_1)


def test_weights_off_the_levels_get_8_bits_beside_those_on_them(llama: Exported, tmp_path: Path) -> None:
    model = onnx.load(llama.fp32 / "model.onnx")
    first = next(item for item in model.graph.initializer if item.name.endswith("down_proj.weight"))
    first.CopyFrom(numpy_helper.from_array(through_gguf(numpy_helper.to_array(first), Type.Q4_0), first.name))
    mixed = copy_with_graph(llama.fp32, model, tmp_path / "mixed")
    weights = GraphWeights.from_graph(mixed / "model.onnx")
    counts = weights.carry_over(4)
    assert counts["4 bits"] == 1
    assert counts["rounded"] == len({product.weight for product in weights.weight_nodes}) - 1
    graph = weights.quantize(dict.fromkeys(weights.groups, BlockFormat(4, 32))).graph
    bits = [a.i for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"]
    assert sorted(set(bits)) == [4, 8]
    assert bits.count(4) == 1
    assert GraphWeights.from_graph(llama.fp32 / "model.onnx").carry_over(4) == {}
