"""Weights that are not those of the files: named by tensor. What older versions left in files does no harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from limbeck.registry.checkpoints.load import load_model
from limbeck.registry.core.errors import BadInput
from tests.registry.checkpoints.published import LLAMA, PUBLISHED, logits, write_checkpoint


@pytest.fixture
def damaged(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkpoint whose tensors a function changed: parameter `change`, and `raw`, its config.json."""
    raw, change = request.param
    folder = write_checkpoint(tmp_path / "damaged", raw)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


UP = "model.layers.1.mlp.up_proj.weight"
TIED = LLAMA | dict(tie_word_embeddings=True)


def put(tensor: str, *values: float) -> Any:
    return lambda weights: weights[tensor].reshape(-1).__setitem__(slice(len(values)), values)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ((LLAMA, put(UP, *[np.nan] * 12)), f"{UP} has 12 NaN values\n"),
        ((LLAMA, put(UP, -np.inf)), f"{UP} has 1 infinite value\n"),
        ((LLAMA, put(UP, np.nan, np.inf, np.inf)), f"{UP} has 1 NaN value and 2 infinite values"),
        ((LLAMA, lambda w: w.pop(UP)), f"lacks weights that its config.json asks for: {UP}"),
        ((LLAMA, lambda w: w.pop("lm_head.weight")), "lacks weights .*: lm_head.weight"),
        ((LLAMA, lambda w: w.update({UP: w[UP][:7]})), rf"{UP} is \[7, 32\], not \[64, 32\]"),
        ((LLAMA, lambda w: w.update({"model.layers.2.mlp.up_proj.weight": w[UP]})), "does not use: model.layers.2.mlp"),
        ((LLAMA, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": w["model.norm.weight"]})),
         "does not use: model.layers.0.self_attn.q_proj.bias"),
        ((TIED, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})),
         "tie_word_embeddings is true .* different values for lm_head.weight and model.embed_tokens.weight"),
    ],
    indirect=["damaged"],
)  # fmt: skip
def test_damaged_weights_are_named(damaged: Path, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_model(damaged)


@pytest.mark.parametrize(
    "damaged",
    [
        (TIED, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]})),
        (TIED, lambda w: w.update({"lm_head.weight": w.pop("model.embed_tokens.weight")})),
        (LLAMA, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})),
        (LLAMA, lambda w: w.update({"v_head.weight": np.ones((1, 32), np.float32)})),
        (LLAMA, put(UP, 3e38, 3e38, 3e38)),  # finite, but their sum is not
        (PUBLISHED["Pythia"], lambda w: w.update({
            "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 8, 8), np.uint8),
            "gpt_neox.layers.0.attention.masked_bias": np.array(-1e9, np.float32)})),
        (PUBLISHED["GPT-2"], lambda w: [w.update({name.removeprefix("transformer."): w.pop(name)}) for name in [*w]]),
    ],
    indirect=True,
)  # fmt: skip
def test_what_older_versions_left_in_files_does_no_harm(damaged: Path) -> None:
    assert np.isfinite(logits(load_model(damaged))).any()
