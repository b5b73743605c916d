"""Write an ONNX graph to disk: small weights inside the file, large ones in a file beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from limbeck.export.graph.builder import SideBySide

if TYPE_CHECKING:
    import onnx

# Bytes of weights. Above it they go to a file of their own, which onnxruntime maps into memory instead of reading.
MAX_SINGLE_FILE_BYTES = 2**24
MIN_EXTERNAL_BYTES = 1024  # smaller tensors stay in the graph
ALIGNMENT = 64  # bytes


def save_graph(model: onnx.ModelProto, path: Path, arrays: Mapping[str, np.ndarray | SideBySide] | None = None) -> int:
    """Write `model` to `path`, and weights of more than 16 MB to `<path>_data`. Returns the bytes of the weights.

    The weights are written one after the other: no copy of all of them is made.

    Args:
        arrays: more initializers of the model, by name.
    """
    import onnx

    tensors = [*_stored_tensors(model), *_stored_arrays(arrays or {})]
    size = sum(tensor.size for tensor in tensors)
    saved = onnx.ModelProto()  # all of `model` but its weights
    _copy_fields(model, saved, "graph")
    _copy_fields(model.graph, saved.graph, "initializer")
    if size > MAX_SINGLE_FILE_BYTES:
        with path.with_name(f"{path.name}_data").open("wb") as file:
            saved.graph.initializer.extend(tensor.write(file) for tensor in tensors)
    else:
        saved.graph.initializer.extend(tensor.proto() for tensor in tensors)
    path.write_bytes(saved.SerializeToString())
    return size


class _StoredTensor:
    """One initializer on its way to disk.

    Attributes:
        size: bytes of its values.
        proto: makes the whole onnx.TensorProto.
    """

    def __init__(self, name: str, dims: Any, data_type: int, size: int, proto: Any, data: Callable[[], Any]) -> None:
        self.size, self.proto = size, proto
        self._name, self._dims, self._data_type, self._data = name, dims, data_type, data

    def write(self, file: BinaryIO) -> onnx.TensorProto:
        """Append the values to `file` if they are large. Returns the initializer for the graph."""
        import onnx

        if self.size < MIN_EXTERNAL_BYTES:
            return self.proto()
        file.write(bytes(-file.tell() % ALIGNMENT))
        tensor = onnx.TensorProto(name=self._name, dims=self._dims, data_type=self._data_type)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": Path(file.name).name, "offset": file.tell(), "length": self.size}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        file.write(self._data())
        return tensor


def _stored_tensors(model: onnx.ModelProto) -> Iterator[_StoredTensor]:
    for item in model.graph.initializer:

        def proto(item: Any = item) -> Any:
            return item

        def data(item: Any = item) -> Any:
            return item.raw_data

        yield _StoredTensor(item.name, item.dims, item.data_type, len(item.raw_data), proto, data)


def _stored_arrays(arrays: Mapping[str, np.ndarray | SideBySide]) -> Iterator[_StoredTensor]:
    from onnx import helper, numpy_helper

    for name, array in arrays.items():

        def contiguous(array: np.ndarray | SideBySide = array) -> Any:
            return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

        def proto(name: str = name, array: np.ndarray | SideBySide = array) -> Any:
            return numpy_helper.from_array(np.ascontiguousarray(array), name)

        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        yield _StoredTensor(name, array.shape, kind, array.nbytes, proto, contiguous)


def _copy_fields(source: Any, target: Any, without: str) -> None:
    """Copy the fields of a protobuf message, all but one."""
    for descriptor, value in source.ListFields():
        if descriptor.name == without:
            continue
        field = getattr(target, descriptor.name)
        if isinstance(value, (str, bytes, int, float)):
            setattr(target, descriptor.name, value)
        elif hasattr(field, "MergeFrom") and not hasattr(value, "CopyFrom"):
            field.MergeFrom(value)
        else:
            field.CopyFrom(value)
