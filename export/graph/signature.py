"""Read the inputs and outputs of an ONNX graph: names, types and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

Signature = dict[str, list[dict[str, Any]]]


def graph_signature(graph: Path) -> Signature:
    """Return the `inputs` and `outputs` of the ONNX file `graph`, in its order, without reading external weights.

    Each is {"name", "type", "shape"}: a numpy type name, and a shape of integers and names of open sizes.
    """
    model = onnx.load(graph, load_external_data=False).graph
    return {"inputs": [_describe(item) for item in model.input], "outputs": [_describe(item) for item in model.output]}


def _describe(item: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = item.type.tensor_type
    shape = [size.dim_value if size.HasField("dim_value") else size.dim_param for size in tensor.shape.dim]
    return {"name": item.name, "type": str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), "shape": shape}
