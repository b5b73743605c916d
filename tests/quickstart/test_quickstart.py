"""The whole loop at a tiny scale, from the bundled teacher to a promoted artifact that generates."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from limbeck.evals.cost import runner
from limbeck.evals.cost.measure import measure_costs
from limbeck.evals.cost.runner import TimingPlan
from limbeck.evals.scores import scorecard
from limbeck.quickstart import cli
from limbeck.registry.mlflow.store import Store
from tests import ROOT
from tests.conftest import Result
from tests.forked_python import ForkedPython

# Little held-out text: every run reads, tokenizes and scores all of it.
RECIPE = """
name = "tiny-coder"
[data]
source = "stdlib"
heldout = 0.03
max_length = 128
max_tokens = 16384
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
eval_steps = 16
per_device_train_batch_size = 8
bf16 = false
"""
POLICY = "[quality]\ntasks = ['stdlib_bits_per_byte']\n"
TEACHER = ROOT / "quickstart" / "teacher"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Makes the cost of a model quick to measure. The models of each measurement, in order."""
    plan = TimingPlan(prompt_tokens=16, new_tokens=8, rounds=3, batches=(1,), threads=1)
    runs: list[list[str]] = []

    def measure(models: list[Any], **options: Any) -> Any:
        runs.append([model.label for model in models])
        return measure_costs(models, plan, **options)

    monkeypatch.setattr(scorecard, "measure_costs", measure)
    return runs


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets new processes skip the imports. The module that each ran, in order."""
    modules: list[str] = []

    def popen(command: list[str], **options: Any) -> ForkedPython:
        modules.append(command[3])
        return ForkedPython(command, **options)

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, popen(command).wait())

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE))
    monkeypatch.setattr(cli, "subprocess", SimpleNamespace(run=run))
    return modules


def test_the_loop_is_refused_resumed_promoted_and_rolled_back(
    limbeck: Callable[..., Result], store: Store, tmp_path: Path, measured: list[list[str]], forked: list[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(teacher=TEACHER))
    (tmp_path / "policy.toml").write_text(POLICY + "min_retention = 1.4\n")
    loop = ("quickstart", "--recipe", "recipe.toml", "--policy", "policy.toml", "--limit", 12)

    code, _, err = limbeck(*loop)
    assert code == 1, err
    assert "quality.min_retention (fail)" in err
    assert store.aliases("tiny-coder") == {}
    kinds = [version.kind for version in store.versions("tiny-coder")]
    assert kinds == ["teacher", "student", "student", "onnx", "onnx", "onnx", "onnx"]
    assert [len(models) for models in measured] == [7]
    assert forked == 7 * ["limbeck.evals.cost.worker"]

    # The second run skips what is done, and promotes under a policy that the students meet.
    (tmp_path / "policy.toml").write_text(POLICY + "min_documents = 12\n")
    code, _, err = limbeck(*loop)
    assert code == 0, err
    assert err.count("already made") == 2
    assert err.count("already exported") == 4
    assert len(measured) == 1
    assert forked[7:] == ["limbeck"]  # `generate`
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

    compared = json.loads(limbeck("compare", "tiny-coder/2", "tiny-coder/3", "--format", "json").out)
    [bits] = [task for task in compared["tasks"] if task["task"] == "stdlib_bits_per_byte"]
    assert bits["difference"]["value"] == pytest.approx(bits["candidate"] - bits["reference"])
    assert bits["better"] == "tiny-coder/2"  # the distilled student needs fewer bits per byte than its twin

    assert "onnxruntime" in limbeck("generate", "tiny-coder@production", "import os", "--max-new-tokens", 4).out
    assert limbeck("rollback", "tiny-coder").code == 0
    assert store.aliases("tiny-coder") == {}
    history = json.loads(limbeck("models", "history", "tiny-coder", "--format", "json").out)
    assert [entry["action"] for entry in history["entries"]] == ["promote", "rollback"]


def test_compare_without_registered_models_is_an_error(limbeck: Callable[..., Result], store: Store) -> None:
    code, _, err = limbeck("compare", "tiny-coder/2", "tiny-coder/3")
    assert code == 2
    assert "nothing is registered yet" in err
