"""Float32 artifacts to quantize."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.export.quantize.evaluate import CandidateEvaluator
from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from tests.export.export_helpers import Exported


@pytest.fixture
def gpt2_with_optimum_graph(tiny_gpt2: Path, optimum_artifact: Callable[[Path], Path]) -> tuple[Path, Path]:
    """GPT-2 (biases, learned positions, tied head) and its artifact with optimum's graph."""
    return tiny_gpt2, optimum_artifact(tiny_gpt2)


@pytest.fixture(params=["fused", "optimum"])
def model_and_fp32(request: pytest.FixtureRequest, llama: Exported) -> tuple[Path, Path]:
    """A torch model and its float32 artifact, with each kind of graph."""
    return (llama.torch, llama.fp32) if request.param == "fused" else request.getfixturevalue("gpt2_with_optimum_graph")


@pytest.fixture(scope="module")
def evaluator(llama: Exported, tmp_path_factory: pytest.TempPathFactory) -> CandidateEvaluator:
    """Scores candidates on 128 tokens."""
    return CandidateEvaluator(llama.fp32, tmp_path_factory.mktemp("candidates"), SAMPLE_TEXTS, tokens=128)
