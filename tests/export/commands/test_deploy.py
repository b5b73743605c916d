"""`limbeck deploy`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.conftest import Result
from tests.export.export_helpers import Exported

Limbeck = Callable[..., Result]
pytestmark = pytest.mark.usefixtures("limbeck_home")


def test_the_bundle_of_a_folder_completes_prompts(limbeck: Limbeck, llama: Exported, tmp_path: Path) -> None:
    result = limbeck("deploy", llama.fp32, "--output", tmp_path / "bundle", "--no-hashes")
    assert result.code == 0
    assert "verified" in result.out
    assert f"{tmp_path}/bundle/start" in result.err
    result = limbeck("generate", tmp_path / "bundle", "def ", "--max-new-tokens", 4, "--format", "json")
    assert json.loads(result.out)[0]["digest"] == llama.variants[0].digest


def test_a_registered_version_is_exported_deployed_and_completed(
    limbeck: Limbeck, store: Store, tiny_llama: Path, tmp_path: Path
) -> None:
    store.register(NewVersion(name="coder", kind="teacher"), tiny_llama)
    assert limbeck("deploy", "coder/1", "--output", tmp_path / "bundle").err.strip().endswith("limbeck export coder/1")
    code, out, _ = limbeck("export", "coder/1", "--precision", "int8-weight, fp32")
    assert code == 0
    assert "coder/2" in out
    assert "coder/3" in out
    code, _, err = limbeck("deploy", "coder/1", "--output", tmp_path / "bundle")
    assert code == 2
    assert "its ONNX variants: coder/2 (fp32), coder/3 (int8-weight)" in err

    code, out, _ = limbeck("deploy", "coder/3", "--output", tmp_path / "bundle", "--no-hashes", "--format", "json")
    assert code == 0
    digest = store.get("coder/3").digest
    deployed = {"bundle": str(tmp_path / "bundle"), "model": "coder/3", "digest": digest}
    assert json.loads(out) == deployed | {"sbom": None, "signed_by": None}  # it was never promoted
    done = limbeck(
        "generate", "coder/2", "def add(", "--against", "coder/1", "--max-new-tokens", 12, "--format", "json"
    )
    assert done.code == 0
    ours, teacher = json.loads(done.out)
    assert (ours["model"], ours["engine"]) == ("coder/2", "onnxruntime")
    assert (teacher["model"], teacher["engine"]) == ("coder/1", "torch")
    assert ours["text"] == teacher["text"]
    assert ours["new_tokens"] == teacher["new_tokens"] == 12
    assert ours["digest"] == store.get("coder/2").digest
    assert all(done[speed] > 0 for done in (ours, teacher) for speed in ("prefill_tokens_per_s", "decode_tokens_per_s"))
