"""The whole loop at a tiny scale, from the bundled teacher to a promoted artifact that generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.mlflow.store import Store
from tests import ROOT

RECIPE = """
name = "tiny-coder"
[data]
source = "stdlib"
heldout = 0.15
max_length = 128
max_tokens = 32768
[teacher]
model = "{teacher}"
[students.tiny.config]
model_type = "llama"
hidden_size = 48
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
tie_word_embeddings = true
[objectives.distilled]
divergence = "forward_kl"
[objectives.labels]
labels = 1.0
[training]
optim = "muon"
learning_rate = 2e-2
max_steps = 16
per_device_train_batch_size = 16
"""
QUALITY = "[quality]\nmin_retention = {0}\ntasks = ['stdlib_bits_per_byte']\n"
TEACHER = ROOT / "quickstart" / "teacher"


@pytest.mark.timeout(280)
def test_the_loop_is_refused_resumed_promoted_and_rolled_back(
    limbeck: Callable[..., tuple[int, str, str]], store: Store, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(teacher=TEACHER))
    (tmp_path / "policy.toml").write_text(QUALITY.format(1.4))
    loop = ("quickstart", "--recipe", "recipe.toml", "--policy", "policy.toml", "--limit", 12)

    code, _, err = limbeck(*loop)
    assert code == 1, err
    assert "quality.min_retention (fail)" in err
    assert store.aliases("tiny-coder") == {}
    kinds = [version.kind for version in store.versions("tiny-coder")]
    assert kinds == ["teacher", "student", "student", "onnx", "onnx", "onnx", "onnx"]

    # On bits per byte alone these students are far above nothing; what is done is not done again.
    tasks = ("--tasks", "stdlib_bits_per_byte", "--include-path", "home/tasks/stdlib", "--against", "tiny-coder/1")
    assert limbeck("eval", "tiny-coder", *tasks).code == 0
    (tmp_path / "policy.toml").write_text(QUALITY.format(0.3))
    code, _, err = limbeck(*loop)
    assert code == 0, err
    assert err.count("already made") == 2
    assert err.count("already exported") == 4
    assert len(store.versions("tiny-coder")) == 7
    assert store.aliases("tiny-coder").keys() == {"production"}
    assert (tmp_path / "home" / "reports" / "tiny-coder.html").read_text().startswith("<!doctype html>")

    rows = json.loads(limbeck("leaderboard", "tiny-coder", "--format", "json").out)
    assert len(rows) == 7
    by_version = {row["version"]: row for row in rows}
    exact = next(row for row in rows if row["kind"] == "onnx" and row["precision"] == "fp32")
    for task, quality in by_version[exact["parent"]]["quality"].items():
        assert exact["quality"][task]["value"] == pytest.approx(quality["value"], abs=1e-4)
    assert all(row["cost"]["decode_tokens_per_s"] > 0 for row in rows)

    twins = json.loads(limbeck("compare", "tiny-coder/2", "tiny-coder/3", "--format", "json").out)
    (twin,) = twins["tasks"]
    assert twin["task"] == "stdlib_bits_per_byte"
    assert twin["difference"]["value"] == pytest.approx(twin["candidate"] - twin["reference"])
    assert twin["better"] == "tiny-coder/2"  # fewer bits per byte, and it is the distilled one

    assert "onnxruntime" in limbeck("generate", "tiny-coder@production", "import os", "--max-new-tokens", 4).out
    assert limbeck("rollback", "tiny-coder").code == 0
    assert store.aliases("tiny-coder") == {}
    history = json.loads(limbeck("models", "history", "tiny-coder", "--format", "json").out)
    assert [entry["action"] for entry in history["entries"]] == ["promote", "rollback"]


def test_compare_holds_the_student_against_its_twin(limbeck: Callable[..., tuple[int, str, str]], store: Store) -> None:
    code, _, err = limbeck("compare", "tiny-coder/2", "tiny-coder/3")
    assert code == 2
    assert "nothing is registered yet" in err
