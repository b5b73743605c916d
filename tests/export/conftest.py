"""ONNX artifacts of the tiny models, each made once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.variants import export_folder
from limbeck.export.runtime.runtime import Runtime
from tests.conftest import make_model
from tests.export.chat_artifacts import ArtifactWithTemplate, copy_with_template
from tests.export.export_helpers import Exported


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Exported]:
    """Return a function that exports a torch folder to fp32 and int8, each folder once."""
    exports: dict[Path, Exported] = {}

    def variants(model: Path) -> Exported:
        if model not in exports:
            folder = tmp_path_factory.mktemp("onnx")
            exports[model] = Exported(
                model, folder / "fp32", folder / "int8-weight", export_folder(model, folder, ["int8-weight", "fp32"])
            )
        return exports[model]

    return variants


@pytest.fixture(scope="session")
def llama(exported: Callable[[Path], Exported], tiny_llama: Path) -> Exported:
    """The tiny Llama and its variants. Tests must not change them."""
    return exported(tiny_llama)


@pytest.fixture(scope="session", params=["llama", "qwen2", "gpt2", "neox"])
def family(request: pytest.FixtureRequest, exported: Callable[[Path], Exported]) -> Exported:
    """The variants of a tiny model of each family."""
    return exported(request.getfixturevalue(f"tiny_{request.param}"))


@pytest.fixture(scope="session")
def runtime(llama: Exported) -> Runtime:
    """The fp32 artifact of the tiny Llama, loaded."""
    return Runtime.load(llama.fp32, threads=1)


@pytest.fixture(scope="session")
def artifact_with_template(llama: Exported, tmp_path_factory: pytest.TempPathFactory) -> ArtifactWithTemplate:
    """Copies the fp32 artifact with a chat template; parameters as `copy_with_template` from `template` on."""

    def make(template: Any, in_config: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("chat") / "fp32"
        return copy_with_template(llama.fp32, llama.torch, folder, template, in_config)

    return make


@pytest.fixture(scope="session")
def boundless(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """An artifact with a context so long that a text can grow until the test ends."""
    folder = tmp_path_factory.mktemp("boundless")
    model = make_model(folder / "torch", tokenizer_folder, "llama", max_position_embeddings=200_000)
    export_onnx(model, folder / "fp32")
    return folder / "fp32"
