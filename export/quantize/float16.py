"""Convert a graph to float16: weights, activations and cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.registry.core.errors import BadInput


def load_as_float16(graph: Path) -> Any:
    """Load a float32 graph and convert it to float16. Returns an onnx.ModelProto."""
    import onnx

    return convert_to_float16(onnx.load(graph))


def convert_to_float16(model: Any) -> Any:
    """Convert all float32 tensors of an onnx.ModelProto to float16; the logits are cast back to float32 at the end.

    onnxruntime's norms accumulate in float32 in either case. If the CPU has no float16 kernel of an operator,
    onnxruntime runs the operator in float32 between casts.

    Raises BadInput for a gated delta rule, whose state onnxruntime keeps in float32.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if any(node.op_type == "GatedDeltaNet" for node in model.graph.node):
        raise BadInput(
            "the model keeps the state of a gated delta rule, which has no float16 form",
            fix="use fp32, int8-weight or int4 on the CPU",
        )
    # onnx's shape inference stops at the first fused operator, and these graphs do not need it.
    return convert_float_to_float16(model, keep_io_types=["logits"], disable_shape_infer=True)
