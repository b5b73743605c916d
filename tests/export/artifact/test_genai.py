"""The same artifact, unchanged, in onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limbeck.export.artifact import genai
from limbeck.export.artifact.export import export_onnx
from limbeck.export.graph.families.table import FAMILIES as GRAPH_FAMILIES
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.digest import folder_digest, read_manifest
from tests.export.export_helpers import Exported
from tests.families import FAMILIES, Family, make_checkpoint

PROMPTS = ["def add(a, b):\n    return", "x"]
NEW_TOKENS = 12
GENAI_TYPES = {model_type for model_type, family in GRAPH_FAMILIES.items() if family.genai_type}
READ_BY_GENAI = [family for family in FAMILIES if family.model_type in GENAI_TYPES]


@pytest.mark.parametrize("family", READ_BY_GENAI, ids=lambda family: family.name.split(",")[0])
def test_onnxruntime_genai_runs_it(family: Family, tokenizer_folder: Path, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    artifact = tmp_path / "onnx"
    digest = export_onnx(make_checkpoint(family, tokenizer_folder, tmp_path / "torch"), artifact)
    _compare_with_genai(og, artifact)
    assert folder_digest(artifact) == digest


@pytest.mark.parametrize("artifact", ["int4"], indirect=True)
def test_onnxruntime_genai_runs_weights_in_4_bits(artifact: Path) -> None:
    _compare_with_genai(pytest.importorskip("onnxruntime_genai"), artifact)


def _compare_with_genai(og: Any, artifact: Path) -> None:
    """Check that its greedy tokens are those of Limbeck's runtime."""
    runtime = Runtime.load(artifact, threads=1)
    model = og.Model(str(artifact))
    for prompt in PROMPTS:
        ids = [int(token) for token in og.Tokenizer(model).encode(prompt)]
        assert ids == runtime.encode(prompt)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + NEW_TOKENS)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        new = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
        expected = runtime.generate([prompt], max_new_tokens=NEW_TOKENS)[0].token_ids
        ends = runtime.eos_token_ids  # onnxruntime-genai leaves them out
        assert new
        assert new == [token for token in expected if token not in ends]


def test_only_models_that_genai_runs_have_its_configuration(
    llama: Exported, tiny_gpt2: Path, artifact: Path, tmp_path: Path
) -> None:
    export_onnx(tiny_gpt2, tmp_path / "gpt2")
    assert not (tmp_path / "gpt2" / genai.CONFIG_FILE).exists()
    assert (artifact / genai.CONFIG_FILE).exists() == (read_manifest(artifact)["graph"] == "fused")
    assert (llama.int8 / genai.CONFIG_FILE).read_bytes() == (llama.fp32 / genai.CONFIG_FILE).read_bytes()
