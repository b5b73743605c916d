"""The second moments of inputs, against PyTorch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.export.quantize.blocks import calibration
from limbeck.export.quantize.blocks.calibration import input_moments
from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.quantize.weight_only import GraphWeights
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.checkpoints.load import load_model
from limbeck.registry.core.errors import BadInput
from tests.export.export_helpers import Exported


@pytest.mark.parametrize("limit", [1, 2**27])
def test_moments_are_those_of_pytorch(
    llama: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(calibration, "MOMENTS_BYTES", limit)  # 1: a run over the text for each tensor
    texts = SAMPLE_TEXTS[:2]
    products = GraphWeights.from_graph(llama.fp32 / "model.onnx").weight_nodes
    down = {item.input_name: item.inputs for item in products if "down_proj" in item.weight}
    found = dict(input_moments(llama.fp32, tmp_path, down, texts))
    assert list(found) == list(down)
    model = load_model(llama.torch)
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].numpy()))
    runtime = Runtime.load(llama.fp32, verify=False)
    with torch.inference_mode():
        for text in reversed(texts):
            model(torch.tensor([runtime.encode(text)[: min(256, runtime.max_length)]]))
    for place, moments in enumerate(found.values()):
        values = np.concatenate(seen[place :: len(down)])
        np.testing.assert_allclose(moments, values.T @ values / len(values), rtol=1e-3, atol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_empty_texts_are_refused(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="every document is empty"):
        list(input_moments(llama.fp32, tmp_path, {"model.layers.0.mlp.gated": 64}, [""]))
