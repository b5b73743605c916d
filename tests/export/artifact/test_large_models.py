"""A model whose float32 weights are larger than the 2 GB that one protobuf message can hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.parity import measure_parity, parity_failures
from tests.conftest import make_model
from tests.export.export_helpers import serving
from tests.export.server.client_helpers import complete

SIZES = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 12, "num_attention_heads": 16}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_of_more_than_2_gb_exports_and_serves(tokenizer_folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "torch", tokenizer_folder, "llama", num_key_value_heads=8, **SIZES)
    assert (model / "model.safetensors").stat().st_size > 2**31
    fp32 = tmp_path / "fp32"
    export_onnx(model, fp32)
    for precision in ("fp32", "int8-weight"):
        if precision != "fp32":
            export_onnx(model, tmp_path / precision, precision, fp32_artifact=fp32)
        parity = measure_parity(model, tmp_path / precision, max_documents=4, max_tokens=32, new_tokens=4)
        assert not parity_failures(parity)  # the limits of quality are for trained weights
        with serving(tmp_path / precision) as served:
            assert complete(served, new=4).status_code == 200
