"""Artifacts with each kind of graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.registry.core.digest import folder_digest
from tests.export.export_helpers import Exported

KINDS = ["fused", "int4", "optimum"]


@pytest.fixture(scope="session")
def artifacts(
    llama: Exported, optimum_artifact: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Kind -> an artifact: with a fused graph, with weights in 4 bits, with optimum's graph."""
    int4 = tmp_path_factory.mktemp("int4") / "onnx"
    export_onnx(llama.torch, int4, "int4", fp32_artifact=llama.fp32)
    return dict(zip(KINDS, [llama.fp32, int4, optimum_artifact(llama.torch)], strict=True))


@pytest.fixture(scope="session", params=KINDS)
def artifact(request: pytest.FixtureRequest, artifacts: dict[str, Path]) -> Iterator[Path]:
    """An artifact of each kind. Tests must not change it."""
    folder = artifacts[request.param]
    before = folder_digest(folder)
    yield folder
    assert folder_digest(folder) == before
