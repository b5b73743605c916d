"""ONNX artifacts of the tiny models, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from export_helpers import Exported

from export.runtime import Runtime
from export.variants import export_folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Exported]:
    """Export a torch folder as fp32 and int8; each folder once."""
    made: dict[Path, Exported] = {}

    def export(model: Path) -> Exported:
        if model not in made:
            to = tmp_path_factory.mktemp("onnx")
            made[model] = Exported(model, to / "fp32", to / "int8", export_folder(model, to, ["int8", "fp32"]))
        return made[model]

    return export


@pytest.fixture(scope="session")
def llama(exported: Callable[[Path], Exported], tiny_llama: Path) -> Exported:
    return exported(tiny_llama)


@pytest.fixture(scope="session", params=["llama", "qwen2", "gpt2", "neox"])
def family(request: pytest.FixtureRequest, exported: Callable[[Path], Exported]) -> Exported:
    return exported(request.getfixturevalue(f"tiny_{request.param}"))


@pytest.fixture(scope="session")
def runtime(llama: Exported) -> Runtime:
    return Runtime.load(llama.fp32, threads=1)
