"""Records and artifact folders to put in a store."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from registry.records import Cost, Estimate, Parity, Relative, Scorecard, TaskResult


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """An artifact folder that looks like a model; other `content`, other digest."""

    def make(content: str, onnx: bool = False) -> Path:
        folder = tmp_path / "made" / content
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / ("model.onnx" if onnx else "model.safetensors")).write_text(content * 100)
        return folder

    return make


def make_card(artifact: str, **changes: Any) -> Scorecard:
    """A scorecard of two tasks; `retention` is (value, low, high), `usd` the price of a million tokens."""
    retention = changes.pop("retention", (0.97, 0.95, 0.99))
    usd = changes.pop("usd", 1.0)
    documents = changes.pop("documents", 500)
    tasks = changes.pop("tasks", ("bits", "choice"))
    cost_ratio = changes.pop("cost_ratio", 0.25)
    result = TaskResult(
        metric="acc",
        value=0.5,
        stderr=0.01,
        higher_is_better=True,
        documents=documents,
        task_hash="t",
        prompt_hash="p",
    )
    cost = Cost(
        params=1000,
        disk_bytes=4000,
        peak_rss_bytes=10_000,
        prefill_tokens_per_s=1e4,
        decode_tokens_per_s=300.0,
        p50_ms=20.0,
        p95_ms=30.0,
        usd_per_million_tokens=usd,
        usd_per_hour=1.0,
        prompt_tokens=64,
        new_tokens=64,
        requests=20,
        threads=1,
        machine="a test",
    )
    value, low, high = retention
    estimate = Estimate(value=value, low=low, high=high)
    relative = Relative(
        teacher="m/1",
        teacher_digest="0" * 64,
        retention=estimate,
        task_retention=dict.fromkeys(tasks, estimate),
        difference={},
        cost_ratio=cost_ratio,
        speedup=2.0,
    )
    fields: dict[str, Any] = {
        "artifact": artifact,
        "model": "m/2",
        "tasks": dict.fromkeys(tasks, result),
        "tasks_digest": "tasks",
        "prompts_digest": "prompts",
        "harness": "lm-eval 0.4.13",
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "cost": cost,
        "relative": relative,
    }
    return Scorecard(**fields | changes)


def make_parity(**changes: Any) -> Parity:
    fields: dict[str, Any] = {
        "reference": "r",
        "precision": "fp32",
        "tokens": 1000,
        "max_logprob_diff": 1e-5,
        "mean_kl": 1e-4,
        "top1_agreement": 0.99,
        "bits_per_byte_reference": 2.0,
        "bits_per_byte": 2.0,
        "greedy_identical": True,
        "passed": True,
    }
    return Parity(**fields | changes)
