"""Bundles of the tiny Llama."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from limbeck.export.bundle.write import write_bundle
from tests.export.export_helpers import Exported


@pytest.fixture(scope="session")
def shared_bundle(llama: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of coder/3. Tests must not change it."""
    bundle = tmp_path_factory.mktemp("shared") / "bundle"
    assert write_bundle(llama.fp32, bundle, manifest_fields={"model": "coder/3"}) == llama.variants[0].digest
    return bundle


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to change."""
    return shutil.copytree(shared_bundle, tmp_path / "bundle")
