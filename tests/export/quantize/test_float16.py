"""Conversion to float16."""

from __future__ import annotations

import onnx

from limbeck.export.quantize.float16 import load_as_float16
from tests.export.export_helpers import (
    Exported,
)


def test_the_cache_is_float16_and_the_logits_are_float32(llama: Exported) -> None:
    graph = load_as_float16(llama.fp32 / "model.onnx").graph
    types = {item.name: item.type.tensor_type.elem_type for item in (*graph.input, *graph.output)}
    assert types["logits"] == onnx.TensorProto.FLOAT
    assert types["input_ids"] == onnx.TensorProto.INT64
    assert {type_ for name, type_ in types.items() if "past" in name or "present" in name} == {onnx.TensorProto.FLOAT16}
    assert not [item.name for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT]
