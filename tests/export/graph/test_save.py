"""Graphs on disk: large weights go to a file of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.graph import save
from limbeck.registry.core.digest import read_manifest
from tests.export.export_helpers import Exported, logits_of


def test_large_weights_are_in_a_file_of_their_own(
    llama: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "MAX_SINGLE_FILE_BYTES", 1000)
    export_onnx(llama.torch, tmp_path / "fp32")
    assert (tmp_path / "fp32/model.onnx_data").stat().st_size > 50_000
    assert "model.onnx_data" in read_manifest(tmp_path / "fp32")["files"]
    assert np.array_equal(logits_of(llama.fp32), logits_of(tmp_path / "fp32"))
