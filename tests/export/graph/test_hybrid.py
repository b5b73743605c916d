"""Hybrids: what their graphs keep between runs, and the text part of a checkpoint that has vision too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.parity import measure_parity
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.session import positions_from_mask
from tests.conftest import SIZES, make_model


def test_padding_on_either_side_leaves_the_states_as_they_are(tokenizer_folder: Path, tmp_path: Path) -> None:
    export_onnx(make_model(tmp_path / "torch", tokenizer_folder, "qwen3_5_text"), tmp_path / "onnx")
    runtime = Runtime.load(tmp_path / "onnx", threads=1)
    states = [place for place, name in enumerate(runtime.past_inputs) if name.endswith((".conv", ".recurrent"))]
    text, padding = np.arange(20, 31)[None], np.zeros((1, 5), np.int64)
    masks = [np.ones_like(text), np.repeat([[0, 1]], [5, 11], axis=1), np.repeat([[1, 0]], [11, 5], axis=1)]
    inputs = [text, np.concatenate([padding, text], axis=1), np.concatenate([text, padding], axis=1)]
    kept = []
    for ids, mask in zip(inputs, masks, strict=True):
        _, cache = runtime.forward(ids, mask, positions_from_mask(mask), runtime.empty_cache(1))
        kept.append([cache[place].numpy() for place in states])
    assert len(states) == 2
    for padded in kept[1:]:
        for ours, alone in zip(padded, kept[0], strict=True):
            assert np.abs(alone).max() > 1e-3
            np.testing.assert_allclose(ours, alone, atol=1e-6)


def test_the_text_part_of_a_model_with_vision_is_exported(tokenizer_folder: Path, tmp_path: Path) -> None:
    text = SIZES["qwen3_5_text"] | dict(vocab_size=300, rope_parameters=dict(
        rope_type="default", rope_theta=10_000.0, mrope_section=[2, 1, 1], partial_rotary_factor=0.5,
    ))  # fmt: skip
    vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32,
                  num_position_embeddings=16)  # fmt: skip
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "torch")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "torch")
    export_onnx(tmp_path / "torch", tmp_path / "onnx", engine="fused")
    parity = measure_parity(tmp_path / "torch", tmp_path / "onnx", max_documents=2, max_tokens=24, new_tokens=4)
    assert parity.passed
    assert parity.max_logprob_diff < 2e-5
