"""Weights in the file beside a graph, read from disk where they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

MAX_READ_BYTES = 2**20  # smaller tensors are read when the graph is


def load_graph(graph: Path) -> onnx.ModelProto:
    """Load the ONNX file `graph` without its large weights, for which `tensor_array` and `with_data` read the disk."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        if _is_external(tensor) and _place(tensor)["length"] <= MAX_READ_BYTES:
            tensor.CopyFrom(with_data(tensor, graph))
    return model


def tensor_array(tensor: onnx.TensorProto, graph: Path) -> np.ndarray:
    """The values of an initializer of the file `graph`; those of a large one are mapped, not read."""
    from onnx import helper, numpy_helper

    if not _is_external(tensor):
        return numpy_helper.to_array(tensor)
    dtype, place = helper.tensor_dtype_to_np_dtype(tensor.data_type), _place(tensor)
    return np.memmap(graph.with_name(place["location"]), dtype, "r", place["offset"], tuple(tensor.dims))


def with_data(tensor: onnx.TensorProto, graph: Path) -> onnx.TensorProto:
    """The initializer with its values in it: itself, or a copy if they are in a file beside `graph`."""
    import onnx

    if not _is_external(tensor):
        return tensor
    data = tensor_array(tensor, graph).tobytes()
    return onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=data)


def _is_external(tensor: onnx.TensorProto) -> bool:
    import onnx

    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _place(tensor: onnx.TensorProto) -> dict[str, Any]:
    """Name of the file, offset and length in bytes."""
    fields = {item.key: item.value for item in tensor.external_data}
    return {"location": fields["location"], "offset": int(fields.get("offset", 0)), "length": int(fields["length"])}
