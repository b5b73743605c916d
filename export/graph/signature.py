"""What goes into a graph and what comes out of it: names, types and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

Tensors = dict[str, list[dict[str, Any]]]


def graph_signature(graph: Path) -> Tensors:
    """The `inputs` and `outputs` of the ONNX file `graph`, in its order; the weights beside it are not read.

    Each is {"name", "type", "shape"}: the type as numpy calls it, in the shape an integer, or the name of a size
    that is open.
    """
    model = onnx.load(graph, load_external_data=False).graph
    return {"inputs": [_tensor(item) for item in model.input], "outputs": [_tensor(item) for item in model.output]}


def _tensor(item: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = item.type.tensor_type
    shape = [size.dim_value if size.HasField("dim_value") else size.dim_param for size in tensor.shape.dim]
    return {"name": item.name, "type": str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), "shape": shape}
