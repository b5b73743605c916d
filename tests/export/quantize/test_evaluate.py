"""Scores of candidate graphs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from limbeck.export.artifact.parity import measure_parity
from limbeck.export.quantize.blocks.formats import BlockFormat
from limbeck.export.quantize.evaluate import CandidateEvaluator, CandidateScore
from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.quantize.weight_only import GraphWeights
from tests.export.export_helpers import (
    Exported,
    copy_with_graph,
)


def test_a_score_equals_the_numbers_of_parity(llama: Exported, evaluator: CandidateEvaluator, tmp_path: Path) -> None:
    same = evaluator.score(onnx.load(llama.fp32 / "model.onnx"))
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.bits_per_byte_change == pytest.approx(0, abs=1e-6)
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")
    model = weights.quantize(dict.fromkeys(weights.groups, BlockFormat(4, 32)))
    long_evaluator = CandidateEvaluator(llama.fp32, tmp_path, SAMPLE_TEXTS[:3], tokens=10_000)
    score = long_evaluator.score(model)
    parity = measure_parity(llama.torch, copy_with_graph(llama.fp32, model, tmp_path / "int4"), SAMPLE_TEXTS[:3])
    assert long_evaluator.tokens == parity.tokens
    assert score.kl == pytest.approx(parity.mean_kl, rel=1e-3)
    assert score.bits_per_byte_change == pytest.approx(
        parity.bits_per_byte / parity.bits_per_byte_reference - 1, abs=1e-5
    )


def test_the_loss_is_the_larger_of_measured_and_expected_change() -> None:
    assert CandidateScore(kl=0.1, bits_per_byte_change=-0.2, expected_change=0.05, bytes=1).loss == 0.05
    assert CandidateScore(kl=0.1, bits_per_byte_change=0.2, expected_change=0.05, bytes=1).loss == 0.2
