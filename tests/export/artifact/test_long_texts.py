"""Texts past the lengths at which a model changes its numbers: windows, query scaling, rotary tables of long texts."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from transformers import AutoConfig

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.long_texts import change_lengths, compared_lengths
from limbeck.export.artifact.parity import measure_parity, parity_failures
from tests.conftest import make_model
from tests.export.export_helpers import rewrite_manifest

FEW: dict[str, int] = dict(max_documents=4, max_tokens=20, new_tokens=2)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[Path, Path]:
    """A Mistral with a window of 24 tokens, and its artifact."""
    folder = tmp_path_factory.mktemp("windowed")
    model = make_model(folder / "torch", tokenizer_folder, "mistral")
    export_onnx(model, folder / "fp32")
    return model, folder / "fp32"


@pytest.mark.parametrize(
    ("model_type", "settings", "lengths"),
    [
        ("llama", {}, []),
        ("llama", dict(rope_parameters=YARN), [32]),
        ("mistral", dict(sliding_window=24), [24]),
        ("mistral", dict(sliding_window=None), []),
        ("qwen2", dict(sliding_window=24, use_sliding_window=False), []),
        ("gemma3_text", dict(sliding_window=24, num_hidden_layers=7), [24]),
        ("phi3", dict(sliding_window=24, original_max_position_embeddings=64), [24, 64]),
    ],
)
def test_the_lengths_of_a_config(model_type: str, settings: dict[str, object], lengths: list[int]) -> None:
    assert change_lengths(AutoConfig.for_model(model_type, **settings)) == lengths


def test_lengths_beyond_the_context_do_not_count_and_very_long_ones_are_not_reached() -> None:
    config = AutoConfig.for_model("mistral", sliding_window=40_000)
    assert compared_lengths(config, max_length=40_000) == ([], [])
    assert compared_lengths(config, max_length=50_000) == ([], [40_000])


def test_a_text_longer_than_the_window_is_compared(windowed: tuple[Path, Path]) -> None:
    parity = measure_parity(*windowed, **FEW)
    assert parity.lengths == (24,)
    assert 0 < parity.long_diff < 1e-4
    assert parity.passed
    assert parity.reading["rotary"] == "equal to config.json"
    assert "past 24 tokens" in parity.describe_lengths()


def test_a_graph_without_the_window_is_refused_though_short_texts_agree(
    windowed: tuple[Path, Path], tmp_path: Path
) -> None:
    model, artifact = windowed
    shutil.copytree(artifact, tmp_path / "broken")
    graph = onnx.load(tmp_path / "broken" / "model.onnx")
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = -1
    onnx.save_model(graph, tmp_path / "broken" / "model.onnx")
    rewrite_manifest(tmp_path / "broken")
    parity = measure_parity(model, tmp_path / "broken", **FEW)
    assert parity.max_logprob_diff < 1e-4
    [failure] = parity_failures(parity)
    assert failure.startswith("a text of more than 24 tokens differs from PyTorch")
