"""int8 weights and activations: dynamic (activation scales computed while the graph runs) or static (calibrated)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limbeck.export.graph.save import save_graph
from limbeck.export.runtime.session import GRAPH

PROTOBUF_LIMIT = 2**31 - 2**20  # bytes; a protobuf message holds at most 2 GB, and the graph itself needs some


def quantize_dynamic_int8(graph: Path, folder: Path) -> None:
    """Write `folder/model.onnx`: the fp32 `graph` with int8 weights, and activations quantized while it runs.

    Each product with a weight becomes MatMulInteger: symmetric int8 weights with one scale per output channel, uint8
    activations with one scale per tensor (onnxruntime's dynamic quantization). The token embedding becomes one int8
    table with one scale per token. The lookup reads it, and so does a tied language-model head: a row of the lookup
    is an output channel of the head.
    """
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    temporary = folder / "quantized.onnx"
    quantize_dynamic(
        graph,
        temporary,
        op_types_to_quantize=["MatMul"],  # onnxruntime converts Gemm to MatMul and Add first
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=_exceeds_protobuf_limit(graph),
        extra_options={"DefaultTensorType": TensorProto.FLOAT},  # no shape inference through fused operators
    )
    _finish(temporary, folder)


def quantize_static_int8(graph: Path, folder: Path, inputs: Iterable[dict[str, np.ndarray]]) -> None:
    """Write `folder/model.onnx`: the fp32 `graph` with int8 weights, and activations with calibrated scales.

    Products become QuantizeLinear, DequantizeLinear and MatMul, which onnxruntime fuses into one integer product. A
    head that is tied to the embedding stays dynamic, as in `quantize_dynamic_int8`.

    Args:
        inputs: feeds of the graph, name -> array; the scale of an activation covers its range over all of them.
    """
    import onnx
    from onnx import TensorProto
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._inputs = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._inputs, None)

    model = load_with_gemm_as_matmul(graph)
    _declare_product_tensors(model.graph)
    typed, temporary = folder / "typed.onnx", folder / "quantized.onnx"
    large = _exceeds_protobuf_limit(graph)
    onnx.save_model(model, typed, save_as_external_data=large, location="typed.onnx_data")
    quantize_static(
        typed,
        temporary,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        use_external_data_format=large,
        extra_options={
            "DefaultTensorType": TensorProto.FLOAT,
            "MatMulConstBOnly": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],  # outputs of products stay float
        },
    )
    for path in folder.glob("typed.onnx*"):
        path.unlink()
    _finish(temporary, folder)


def _declare_product_tensors(graph: Any) -> None:
    """Declare inputs and outputs of products as float, as calibration needs it.

    onnx's shape inference, which would declare them, stops at the first fused operator.
    """
    from onnx import TensorProto, helper

    names = {name for node in graph.node if node.op_type == "MatMul" for name in (node.input[0], node.output[0])}
    names -= {item.name for item in (*graph.input, *graph.output)}
    graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in sorted(names))


def load_with_gemm_as_matmul(graph: Path) -> Any:
    """Load a graph, convert each Gemm to MatMul and Add, and drop the inferred types of its tensors."""
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    wrapper = ONNXModel(onnx.load(graph))
    wrapper.replace_gemm_with_matmul()
    del wrapper.model.graph.value_info[:]
    return wrapper.model


def _exceeds_protobuf_limit(graph: Path) -> bool:
    """Return True if the graph with its weights has more than 2 GB."""
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*")) > PROTOBUF_LIMIT


def _finish(quantized: Path, folder: Path) -> None:
    """Quantize the embedding of the graph in the file `quantized` too, and move the graph to `folder/model.onnx`."""
    import onnx

    model = onnx.load(quantized)
    for path in (*folder.glob(f"{quantized.name}*"), *folder.glob(f"{GRAPH}*")):
        path.unlink()
    del model.graph.value_info[:]  # some types change below; onnxruntime infers them again at load
    _quantize_embedding(model.graph)
    save_graph(model, folder / GRAPH)


def _quantize_embedding(graph: Any) -> None:
    """Replace each table of tokens (and a head tied to it) with an int8 table. Changes `graph`."""
    for name in find_token_tables(graph):
        _quantize_table(graph, name)


def _quantize_table(graph: Any, name: str) -> None:
    from onnx import numpy_helper

    initializer = next(item for item in graph.initializer if item.name == name)
    values, scales = _rows_to_int8(numpy_helper.to_array(initializer))
    graph.initializer.remove(initializer)
    table = _Int8Table(f"{name}_int8", f"{name}_scale", f"{name}_last_axis")
    graph.initializer.extend([
        numpy_helper.from_array(values, table.values),
        numpy_helper.from_array(scales, table.scales),
        numpy_helper.from_array(np.array([-1], np.int64), table.last_axis),
    ])  # fmt: skip
    # optimum's head reads the table through a Transpose, the fused graph's through a Reshape to the same shape.
    transposed = {n.output[0] for n in graph.node if n.op_type in ("Transpose", "Reshape") and name in n.input}
    nodes = []
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] == name:
            nodes += table.lookup(node)
        elif node.output[0] in transposed:
            nodes.append(_node("Transpose", [table.values], [node.output[0]], perm=[1, 0]))
        elif node.op_type in ("MatMul", "FusedMatMul") and node.input[1] in transposed:
            nodes += table.head(node)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


class _Int8Table(NamedTuple):
    """Names of the initializers of an int8 embedding table, and the nodes that read it."""

    values: str  # (V, H) int8
    scales: str  # (V,) float32
    last_axis: str  # (1,) int64, -1

    def lookup(self, gather: Any) -> list[Any]:
        """Return the nodes that replace the float lookup `gather`."""
        from onnx import TensorProto

        out, ids = gather.output[0], gather.input[1]
        return [
            _node("Gather", [self.values, ids], [f"{out}/int8"]),
            _node("Cast", [f"{out}/int8"], [f"{out}/float"], to=TensorProto.FLOAT),
            _node("Gather", [self.scales, ids], [f"{out}/scales"]),
            _node("Unsqueeze", [f"{out}/scales", self.last_axis], [f"{out}/scale"]),
            _node("Mul", [f"{out}/float", f"{out}/scale"], [out]),
        ]

    def head(self, product: Any) -> list[Any]:
        """Return the nodes that replace the float product of a tied head; its activations are quantized as it runs."""
        from onnx import TensorProto

        out = product.output[0]
        quantized = [f"{out}/uint8", f"{out}/scale", f"{out}/zero"]
        return [
            _node("DynamicQuantizeLinear", [product.input[0]], quantized),
            _node("MatMulInteger", [quantized[0], product.input[1], quantized[2]], [f"{out}/int32"]),
            _node("Cast", [f"{out}/int32"], [f"{out}/float"], to=TensorProto.FLOAT),
            _node("Mul", [quantized[1], self.scales], [f"{out}/scales"]),
            _node("Mul", [f"{out}/float", f"{out}/scales"], [out]),
        ]


def _node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(op, inputs, outputs, name=f"{outputs[0]}/{op}", **attributes)


def find_token_embedding(graph: Any) -> str | None:
    """Name the float table that `input_ids` indexes; None if more than the lookup and a tied head reads it."""
    floats = {item.name for item in graph.initializer if item.data_type == 1 and len(item.dims) == 2}
    from_ids = {"input_ids"}  # and tensors made from it: some graphs pass the ids through a Reshape
    name = None
    for item in graph.node:  # in topological order
        if item.op_type in ("Reshape", "Cast", "Identity") and item.input[0] in from_ids:
            from_ids.update(item.output)
        if item.op_type == "Gather" and item.input[0] in floats and item.input[1] in from_ids:
            name = item.input[0]
            break
    readers = [item for item in graph.node if name in item.input]
    transposed = [item.output[0] for item in readers if item.op_type in ("Transpose", "Reshape")]
    heads = [item for item in graph.node for value in transposed if value in item.input]
    only_lookups = all(item.op_type in ("Gather", "Transpose", "Reshape") for item in readers)
    only_products = all(item.op_type in ("MatMul", "FusedMatMul") for item in heads)
    return name if only_lookups and only_products else None


def find_token_tables(graph: Any) -> list[str]:
    """Name the float tables that `input_ids` indexes: the token embedding, and others that nothing else reads."""
    floats = {item.name for item in graph.initializer if item.data_type == 1 and len(item.dims) == 2}
    readers = Counter(name for item in graph.node for name in item.input)
    found = [find_token_embedding(graph)]
    for item in graph.node:
        if item.op_type == "Gather" and item.input[0] in floats and item.input[1] == "input_ids":
            found += [item.input[0]] if readers[item.input[0]] == 1 else []
    return list(dict.fromkeys(name for name in found if name))


def _rows_to_int8(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert (V, H) float32 to (V, H) int8 and (V,) float32 scales, symmetric per row: table ~ int8 * scale."""
    scale = np.abs(table).max(axis=1) / 127
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.rint(table / scale[:, None]).astype(np.int8), scale
