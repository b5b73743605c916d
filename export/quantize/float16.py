"""float16 weights, activations and cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_as_float16(graph: Path) -> Any:
    """The float32 graph in float16. Returns an onnx.ModelProto."""
    import onnx

    return convert_to_float16(onnx.load(graph))


def convert_to_float16(model: Any) -> Any:
    """All float32 tensors of an onnx.ModelProto become float16, but for the logits, which are cast at the end.

    onnxruntime's norms add up in float32 whatever they are given. Where the CPU has no float16 kernel of an operator,
    onnxruntime runs it in float32 between casts.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # What onnx infers ends at the first fused operator, and nothing in these graphs needs it.
    return convert_float_to_float16(model, keep_io_types=["logits"], disable_shape_infer=True)
