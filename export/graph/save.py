"""Write an ONNX graph to disk: small weights inside the file, large ones in a file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

# Bytes of weights. Above it they go to a file of their own, which onnxruntime maps into memory instead of reading.
MAX_SINGLE_FILE_BYTES = 2**24


def save_graph(model: onnx.ModelProto, path: Path, *, consume: bool = False) -> int:
    """Write `model` to `path`, and weights of more than 16 MB to `<path>_data`. Returns the bytes of the weights.

    Args:
        consume: True may take the weights out of `model`, which saves a copy of them in memory.
    """
    import onnx

    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if not consume:
        copy = onnx.ModelProto()  # saving with external data empties the tensors of the model that is saved
        copy.CopyFrom(model)
        model = copy
    onnx.save_model(
        model,
        path,
        save_as_external_data=size > MAX_SINGLE_FILE_BYTES,
        location=f"{path.name}_data",
        size_threshold=1024,
    )
    return size
