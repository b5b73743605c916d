"""A teacher behind `limbeck serve` and a proxy, for the tests of endpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.registry.catalog import endpoint as endpoint_module
from tests.distill.endpoint_helpers import EndpointProxy
from tests.export.export_helpers import Served, serving

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]

KEY = "k3y-of-the-test"


@pytest.fixture(scope="session")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`limbeck serve` of tiny_llama's ONNX artifact; it requires the key."""
    from limbeck.export.artifact.export import export_onnx

    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    export_onnx(tiny_llama, folder, "fp32")
    with serving(folder, KEY) as server:
        yield server


@pytest.fixture
def proxy(served: Served) -> Iterator[EndpointProxy]:
    server = EndpointProxy(served.url)
    yield server
    server.shutdown()


@pytest.fixture
def endpoint_home(limbeck_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint_module, "BACKOFF_S", 0.01)
    return limbeck_home
