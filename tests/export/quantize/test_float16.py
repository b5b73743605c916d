"""Conversion to float16."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.quantize.float16 import load_as_float16
from limbeck.registry.core.errors import BadInput
from tests.conftest import make_model
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


def test_a_gated_delta_rule_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    export_onnx(make_model(tmp_path / "torch", tokenizer_folder, "qwen3_5_text"), tmp_path / "onnx")
    with pytest.raises(BadInput, match="gated delta rule"):
        load_as_float16(tmp_path / "onnx" / "model.onnx")
