"""ONNX artifacts of the tiny models, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.variants import export_folder
from limbeck.export.runtime.runtime import Runtime
from tests.conftest import make_model
from tests.export.export_helpers import Exported


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Exported]:
    """Export a torch folder as fp32 and int8; each folder once."""
    made: dict[Path, Exported] = {}

    def variants(model: Path) -> Exported:
        if model not in made:
            to = tmp_path_factory.mktemp("onnx")
            made[model] = Exported(model, to / "fp32", to / "int8", export_folder(model, to, ["int8", "fp32"]))
        return made[model]

    return variants


@pytest.fixture(scope="session")
def llama(exported: Callable[[Path], Exported], tiny_llama: Path) -> Exported:
    return exported(tiny_llama)


@pytest.fixture(scope="session", params=["llama", "qwen2", "gpt2", "neox"])
def family(request: pytest.FixtureRequest, exported: Callable[[Path], Exported]) -> Exported:
    return exported(request.getfixturevalue(f"tiny_{request.param}"))


@pytest.fixture(scope="session")
def runtime(llama: Exported) -> Runtime:
    return Runtime.load(llama.fp32, threads=1)


@pytest.fixture(scope="session")
def boundless(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """An artifact whose texts may grow for as long as a test runs."""
    folder = tmp_path_factory.mktemp("boundless")
    model = make_model(folder / "torch", tokenizer_folder, "llama", max_position_embeddings=200_000)
    export_onnx(model, folder / "fp32")
    return folder / "fp32"
