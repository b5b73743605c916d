"""The search for the parts of a model that get more bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.quantize.evaluate import CandidateEvaluator
from limbeck.export.quantize.mixed_precision import choose_plan
from limbeck.export.quantize.precisions import FORMATS
from limbeck.export.quantize.settings import QuantizationSettings
from limbeck.export.quantize.switches import switch_graphs
from limbeck.export.quantize.weight_only import BlockFormat, GraphWeights
from limbeck.registry.core.digest import read_manifest
from tests.export.export_helpers import (
    Exported,
)


def test_parts_get_8_bits_until_the_loss_is_within_the_limit(llama: Exported, evaluator: CandidateEvaluator) -> None:
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")
    free = choose_plan(weights, evaluator, FORMATS, max_loss=1e9)
    assert "raised_to_8_bits" not in free.record
    assert {blocks.bits for blocks in free.plan.values()} == {4}
    all_raised = choose_plan(weights, evaluator, FORMATS, max_loss=1e-9)
    assert {blocks.bits for blocks in all_raised.plan.values()} == {8}
    curve = all_raised.record["raised_to_8_bits"]
    assert [point["parts"] for point in curve] == [0, len(weights.groups)]
    assert curve[-1]["kl"] < curve[0]["kl"] / 10
    alone = all_raised.record["alone_in_8_bits"]
    assert set(alone) == set(weights.groups)
    in_4_bits = free.record["in_4_bits"]
    limit = max(in_4_bits["expected_change"], in_4_bits["bits_per_byte_change"]) / 2
    some = choose_plan(weights, evaluator, FORMATS, max_loss=limit)
    raised = [part for part in alone if some.plan[part].bits == 8]
    assert 0 < len(raised) < len(weights.groups)
    assert set(raised) == set(list(alone)[: len(raised)]), "not those that gain most"
    assert evaluator.score(weights.quantize(some.plan)).loss <= limit


def test_a_graph_with_switches_computes_what_each_plan_computes(llama: Exported, evaluator: CandidateEvaluator) -> None:
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")
    four, eight = (dict.fromkeys(weights.groups, BlockFormat(bits, 32)) for bits in (4, 8))
    part_of_output = {node.output_name: node.group for node in weights.weight_nodes}
    graph = switch_graphs(weights.quantize(four), weights.quantize(eight), part_of_output)
    assert graph.parts == weights.groups
    first = evaluator.score(weights.quantize(four))
    score = evaluator.open_switches(graph, first.bytes)
    for parts in ([], ["embedding"], weights.groups[1:3], weights.groups):
        plan = four | {part: eight[part] for part in parts}
        expected = evaluator.score(weights.quantize(plan))
        assert score(parts).kl == pytest.approx(expected.kl, rel=1e-4)
        assert score(parts).bytes == pytest.approx(expected.bytes, abs=64)


def test_the_manifest_says_what_was_chosen_and_on_which_text(llama: Exported, tmp_path: Path) -> None:
    export_onnx(
        llama.torch,
        tmp_path / "int4",
        "int4",
        fp32_artifact=llama.fp32,
        settings=QuantizationSettings(text_source="a test", max_change=1e9),
    )
    record = read_manifest(tmp_path / "int4")["quantization"]
    assert record["in_4_bits"]["kl"] > 0
    assert record["in_4_bits"]["bytes"] > 0
    assert record["chosen_on"] == "a test"
    assert record["chosen"] == FORMATS[4].to_manifest()


def test_an_interrupted_search_goes_on(llama: Exported, evaluator: CandidateEvaluator, limbeck_home: Path) -> None:
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")

    def stop_after_two(line: str) -> None:
        if f"{weights.groups[2]} in 8 bits" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose_plan(weights, evaluator, FORMATS, max_loss=1e-9, report=stop_after_two)
    [file] = (limbeck_home / "searches").iterdir()
    assert list(json.loads(file.read_text())) == weights.groups[:3]
    known = json.loads(file.read_text())
    known[weights.groups[0]]["kl"] = 1.25  # to see that it is not measured again
    file.write_text(json.dumps(known))
    plan = choose_plan(weights, evaluator, FORMATS, max_loss=1e-9)
    assert plan.record["alone_in_8_bits"][weights.groups[0]]["kl"] == 1.25
    assert not any((limbeck_home / "searches").iterdir())
