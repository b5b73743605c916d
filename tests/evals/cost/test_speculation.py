"""`limbeck eval --draft`: how a draft model's proposals speed artifacts up, on the prompts of the tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from limbeck.evals.cost.speculation import PROMPTS, task_prompts
from limbeck.export.artifact.export import export_onnx
from tests.conftest import Result
from tests.evals.task_files import questions, write_task


@pytest.fixture(scope="module")
def int8(tiny_llama: Path, onnx_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of onnx_llama in 8 bits: a draft model that proposes what it chooses."""
    folder = tmp_path_factory.mktemp("draft") / "int8-weight"
    export_onnx(tiny_llama, folder, "int8-weight", fp32_artifact=onnx_llama)
    return folder


def test_prompts_are_spread_over_the_documents() -> None:
    ends = [*(f"prompt {number // 2}" for number in range(200)), None, ""]
    assert task_prompts(pa.table({"prompt_end": ends})) == [f"prompt {n * 100 // PROMPTS}" for n in range(PROMPTS)]
    assert task_prompts(pa.table({"prompt_end": pa.array([None], pa.string())})) == []


def test_a_draft_model_is_timed_and_shown(
    limbeck: Callable[..., Result], limbeck_home: Path, tiny_gpt2: Path, onnx_llama: Path, int8: Path, tmp_path: Path
) -> None:
    write_task(tmp_path, "sums", questions(20))
    assert limbeck("register", onnx_llama, "--name", "coder").code == 0
    command = ["eval", "coder/1", int8, "--tasks", "sums", "--include-path", tmp_path, "--draft", int8]
    done = limbeck(*command, "--format", "json")
    assert done.code == 0, done.err
    own, draft = (card["cost"] for card in json.loads(done.out))
    assert own["acceptance_length"] > 3
    assert own["speculative_speedup"] > 0
    interval = own["intervals"]["speculative_speedup"]
    assert interval["low"] <= own["speculative_speedup"] <= interval["high"]
    assert draft["acceptance_length"] is None
    again = limbeck(*command, "--format", "json")
    assert json.loads(again.out)[0]["cost"] == own  # stored, not timed again
    board = limbeck("leaderboard", "coder")
    assert f"{own['acceptance_length']:.2f}" in board.out
    assert f"{own['speculative_speedup']:.2f}" in board.out
    torch = limbeck("eval", "coder/1", "--tasks", "sums", "--include-path", tmp_path, "--draft", tiny_gpt2)
    assert torch.code == 2
    assert "a draft model is an ONNX artifact" in torch.err
