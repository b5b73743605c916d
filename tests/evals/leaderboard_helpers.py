"""Scorecards to rank, as the tests of the leaderboard and of its page make them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from limbeck.registry.records import Estimate, Relative, Scorecard, TaskResult
from tests.conftest import make_cost

TEACHER = "0" * 64


def make_card(artifact: str, retention: float | None, usd: float, **changes: Any) -> Scorecard:
    """A scorecard of a task, and of a group with one sub-task, at `usd` dollars per million tokens."""
    result = TaskResult(
        metric="acc", value=0.5, stderr=0.01, higher_is_better=True, documents=9, task_hash="t", prompt_hash="p"
    )
    cost = make_cost(usd)
    kept = Estimate(value=retention or 0, low=(retention or 0) - 0.05, high=(retention or 0) + 0.05)
    relative = Relative(
        teacher="m/1",
        teacher_digest=changes.pop("teacher", TEACHER),
        retention=kept,
        task_retention={"single": kept.model_copy(update={"value": kept.value - 0.1})},
        difference={},
        cost_ratio=usd / 2,
        speedup=2 / usd,
    )
    cost = cost.model_copy(update=changes.pop("cost_fields", {}))
    fields: dict[str, Any] = {
        "artifact": artifact,
        "model": "m/0",
        "tasks": {"single": result, "group": result, "sub": result.model_copy(update={"group": "group"})},
        "tasks_digest": "tasks",
        "prompts_digest": "prompts",
        "harness": "lm-eval 0",
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "cost": cost,
        "relative": relative if retention is not None else None,
    }
    return Scorecard.model_validate(fields | changes)
