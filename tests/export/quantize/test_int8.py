"""Calibrated int8 activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from limbeck.export.artifact.export import export_onnx
from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.digest import read_manifest
from tests.export.export_helpers import (
    Exported,
)


def test_static_scales_cover_the_range_of_the_calibration_text(llama: Exported, tmp_path: Path) -> None:
    text = SAMPLE_TEXTS[1]
    export_onnx(
        llama.torch,
        tmp_path / "out",
        "int8-static",
        fp32_artifact=llama.fp32,
        settings=QuantizationSettings([text], "a test"),
    )
    assert read_manifest(tmp_path / "out")["quantization"]["calibration"] == "a test"
    tensors = {
        item.name: numpy_helper.to_array(item) for item in onnx.load(tmp_path / "out/model.onnx").graph.initializer
    }
    plain = onnx.load(llama.fp32 / "model.onnx")
    name = next(node.input[0] for node in plain.graph.node if node.op_type == "MatMul")
    plain.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.array([Runtime.load(llama.fp32).encode(text)[:128]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    for item in session.get_inputs():
        if item.name not in feeds:
            feeds[item.name] = np.zeros([1, item.shape[1], 0, item.shape[3]], np.float32)
    [activations] = session.run([name], feeds)
    assert tensors[f"{name}_scale"] == pytest.approx(
        (max(activations.max(), 0) - min(activations.min(), 0)) / 255, rel=1e-3
    )
