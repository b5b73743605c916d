"""The search for a block format, and the parts of a model that get more bits."""

from __future__ import annotations

from pathlib import Path

from limbeck.export.artifact.export import export_onnx
from limbeck.export.quantize.evaluate import CandidateEvaluator
from limbeck.export.quantize.mixed_precision import choose_plan
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.export.quantize.weight_only import GraphWeights
from limbeck.registry.core.digest import read_manifest
from tests.export.export_helpers import (
    Exported,
)


def test_parts_get_8_bits_until_the_loss_is_within_the_limit(llama: Exported, evaluator: CandidateEvaluator) -> None:
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")
    free = choose_plan(weights, evaluator, 4, max_loss=1e9)
    assert "raised_to_8_bits" not in free.record
    assert {blocks.bits for blocks in free.plan.values()} == {4}
    all_raised = choose_plan(weights, evaluator, 4, max_loss=1e-9)
    assert {blocks.bits for blocks in all_raised.plan.values()} == {8}
    curve = all_raised.record["raised_to_8_bits"]
    assert curve[0]["part"] is None
    assert {point["part"] for point in curve[1:]} == set(weights.groups)
    assert [point["bytes"] for point in curve] == sorted(point["bytes"] for point in curve)
    assert curve[-1]["kl"] < curve[0]["kl"] / 10
    alone = all_raised.record["alone_in_8_bits"]
    gain = {part: (curve[0]["kl"] - one["kl"]) / (one["bytes"] - curve[0]["bytes"]) for part, one in alone.items()}
    assert [point["part"] for point in curve[1:]] == sorted(gain, key=lambda part: -gain[part])
    limit = min(max(one["expected_change"], one["bits_per_byte_change"]) for one in free.record["tried"]) / 2
    some = choose_plan(weights, evaluator, 4, max_loss=limit)
    *before, last = [
        max(point["expected_change"], point["bits_per_byte_change"]) for point in some.record["raised_to_8_bits"]
    ]
    assert last <= limit < min(before)
    assert {blocks.bits for blocks in some.plan.values()} == {4, 8}


def test_the_manifest_lists_all_formats_that_were_tried(llama: Exported, tmp_path: Path) -> None:
    export_onnx(
        llama.torch,
        tmp_path / "int4",
        "int4",
        fp32_artifact=llama.fp32,
        settings=QuantizationSettings(text_source="a test", max_change=1e9),
    )
    record = read_manifest(tmp_path / "int4")["quantization"]
    assert [(one["block_size"], one["symmetric"]) for one in record["tried"]] == [(32, False)]
    assert all(one["kl"] > 0 and one["bytes"] > 0 for one in record["tried"])
    assert record["chosen_on"] == "a test"
    assert record["chosen"]["symmetric"] is False
