"""Artifacts with each kind of graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.registry.core.digest import folder_digest
from tests.export.export_helpers import Exported


@pytest.fixture(scope="session", params=["fused", "int4", "optimum"])
def artifact(
    request: pytest.FixtureRequest, llama: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """An artifact with each kind of graph, and one with weights in 4 bits. Tests must not change it."""
    folder = llama.fp32 if request.param == "fused" else tmp_path_factory.mktemp("other") / "onnx"
    if request.param == "optimum":
        export_onnx(llama.torch, folder, fused=False)
    elif request.param == "int4":
        export_onnx(llama.torch, folder, "int4", fp32_artifact=llama.fp32)
    before = folder_digest(folder)
    yield folder
    assert folder_digest(folder) == before
