"""int8 weights and activations: dynamic, scales of activations found as the graph runs, or static, calibrated."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.export.quantize.evaluate import save_graph
from limbeck.export.runtime.session import GRAPH

PROTOBUF_LIMIT = 2**31 - 2**20  # one protobuf message ends at 2 GB; leave room for the graph itself


def quantize_dynamic_int8(graph: Path, folder: Path) -> None:
    """Write `folder/model.onnx`: the fp32 `graph` with int8 weights and activations quantised as it runs.

    Every product with a weight becomes MatMulInteger: symmetric int8 weights with one scale per output
    channel, activations uint8 with one scale per tensor (onnxruntime's dynamic quantisation). The token
    embedding becomes one int8 table with one scale per token, read by the lookup and, where the embedding is
    tied, by the language-model head: a row of the lookup is an output channel of the head.
    """
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    temporary = folder / "quantized.onnx"
    quantize_dynamic(
        graph,
        temporary,
        op_types_to_quantize=["MatMul"],  # Gemm is turned into MatMul and Add first
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=_exceeds_protobuf_limit(graph),
        extra_options={"DefaultTensorType": TensorProto.FLOAT},  # no shape inference through fused operators
    )
    _finish(temporary, folder)


def quantize_static_int8(graph: Path, folder: Path, inputs: Iterable[dict[str, np.ndarray]]) -> None:
    """As `quantize_int8`, but each activation has the scale that covers what it was for `inputs`, the graph's own.

    Products are written as QuantizeLinear, DequantizeLinear and MatMul, which onnxruntime runs as one of integers. A
    head that is tied to the embedding finds its activations' scale as it runs.
    """
    import onnx
    from onnx import TensorProto, helper
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

    # Calibration looks at tensors that the graph declares; what onnx would infer ends at the first fused operator.
    model = load_with_gemm_as_matmul(graph)
    names = {name for node in model.graph.node if node.op_type == "MatMul" for name in (node.input[0], node.output[0])}
    names -= {item.name for item in (*model.graph.input, *model.graph.output)}
    model.graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in sorted(names)
    )
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
            "OpTypesToExcludeOutputQuantization": ["MatMul"],  # sums of products stay float
        },
    )
    for path in folder.glob("typed.onnx*"):
        path.unlink()
    _finish(temporary, folder)


def load_with_gemm_as_matmul(graph: Path) -> Any:
    """The graph with each Gemm as MatMul and Add, and without what was inferred of its tensors."""
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    whole = ONNXModel(onnx.load(graph))
    whole.replace_gemm_with_matmul()
    del whole.model.graph.value_info[:]
    return whole.model


def _exceeds_protobuf_limit(graph: Path) -> bool:
    """A weight file of 2 GB or more lies beside the graph; the quantised one is a quarter of it."""
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*")) > PROTOBUF_LIMIT


def _finish(quantized: Path, folder: Path) -> None:
    """Quantise the embedding of the graph in `quantized` too, and let it take its place in `folder`."""
    import onnx

    model = onnx.load(quantized)
    for path in (*folder.glob(f"{quantized.name}*"), *folder.glob(f"{GRAPH}*")):
        path.unlink()
    del model.graph.value_info[:]  # inferred again when the graph is loaded; some of it changes below
    _quantize_embedding(model.graph)
    save_graph(model, folder / GRAPH)


def _quantize_embedding(graph: Any) -> None:
    """Replace the token embedding (and a head tied to it) by one int8 table, in place."""
    from onnx import TensorProto, helper, numpy_helper

    name = find_token_embedding(graph)
    if name is None:
        return
    initializer = next(item for item in graph.initializer if item.name == name)
    table, scale = _rows_to_int8(numpy_helper.to_array(initializer))
    graph.initializer.remove(initializer)
    names = {"table": f"{name}_int8", "scale": f"{name}_scale", "last": f"{name}_last_axis"}
    graph.initializer.extend([
        numpy_helper.from_array(table, names["table"]),
        numpy_helper.from_array(scale, names["scale"]),
        numpy_helper.from_array(np.array([-1], np.int64), names["last"]),
    ])  # fmt: skip

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
        return helper.make_node(op, inputs, outputs, name=f"{outputs[0]}/{op}", **attributes)

    # optimum's head reads the table transposed, the fused graph's after a Reshape to the shape that it has.
    transposed = {n.output[0] for n in graph.node if n.op_type in ("Transpose", "Reshape") and name in n.input}
    nodes = []
    for item in graph.node:
        out = item.output[0]
        if item.op_type == "Gather" and item.input[0] == name:
            ids = item.input[1]
            nodes += [
                node("Gather", [names["table"], ids], [f"{out}/int8"]),
                node("Cast", [f"{out}/int8"], [f"{out}/float"], to=TensorProto.FLOAT),
                node("Gather", [names["scale"], ids], [f"{out}/scales"]),
                node("Unsqueeze", [f"{out}/scales", names["last"]], [f"{out}/scale"]),
                node("Mul", [f"{out}/float", f"{out}/scale"], [out]),
            ]
        elif out in transposed:
            nodes.append(node("Transpose", [names["table"]], [out], perm=[1, 0]))
        elif item.op_type in ("MatMul", "FusedMatMul") and item.input[1] in transposed:
            quantized = [f"{out}/uint8", f"{out}/scale", f"{out}/zero"]
            nodes += [
                node("DynamicQuantizeLinear", [item.input[0]], quantized),
                node("MatMulInteger", [quantized[0], item.input[1], quantized[2]], [f"{out}/int32"]),
                node("Cast", [f"{out}/int32"], [f"{out}/float"], to=TensorProto.FLOAT),
                node("Mul", [quantized[1], names["scale"]], [f"{out}/scales"]),
                node("Mul", [f"{out}/float", f"{out}/scales"], [out]),
            ]
        else:
            nodes.append(item)
    del graph.node[:]
    graph.node.extend(nodes)


def find_token_embedding(graph: Any) -> str | None:
    """The float table that `input_ids` looks up, if nothing but the lookup and a tied head reads it."""
    floats = {item.name for item in graph.initializer if item.data_type == 1 and len(item.dims) == 2}
    from_ids = {"input_ids"}  # the ids pass through a Reshape in some graphs
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
    plain = all(item.op_type in ("Gather", "Transpose", "Reshape") for item in readers)
    return name if plain and all(item.op_type in ("MatMul", "FusedMatMul") for item in heads) else None


def _rows_to_int8(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(V, H) float32 -> (V, H) int8 and (V,) float32 scales, symmetric per row: table ~ int8 * scale."""
    scale = np.abs(table).max(axis=1) / 127
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.rint(table / scale[:, None]).astype(np.int8), scale
