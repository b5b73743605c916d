"""Scorecards without a model behind them, for the tests of the leaderboard, its page and its comparisons."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from limbeck.registry.records import Estimate, Relative, Scorecard, TaskResult
from tests.conftest import make_cost

TEACHER_DIGEST = "0" * 64
TASK_RESULT = TaskResult(
    metric="acc", value=0.5, stderr=0.01, higher_is_better=True, documents=9, task_hash="t", prompt_hash="p"
)
# A task, and a group with one sub-task.
TASKS = {"single": TASK_RESULT, "group": TASK_RESULT, "sub": TASK_RESULT.model_copy(update={"group": "group"})}


def make_card(artifact: str, retention: float | None, usd: float, **changes: Any) -> Scorecard:
    """A scorecard of TASKS, relative to the teacher m/1.

    Args:
        artifact: digest of the scored version.
        retention: over all tasks, ± 0.05; 0.1 less on the task `single`. None: the card is relative to no teacher.
        usd: dollars per million tokens; the teacher's are 2.
        changes: other values of the card's fields; also `teacher`, its digest, and `cost_fields`, values of its cost.
    """
    teacher_digest = changes.pop("teacher", TEACHER_DIGEST)
    cost = make_cost(usd).model_copy(update=changes.pop("cost_fields", {}))
    fields: dict[str, Any] = {
        "artifact": artifact,
        "model": "m/0",
        "tasks": TASKS,
        "tasks_digest": "tasks",
        "prompts_digest": "prompts",
        "harness": "lm-eval 0",
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "cost": cost,
        "relative": _relative(retention, usd, teacher_digest) if retention is not None else None,
    }
    return Scorecard.model_validate(fields | changes)


def _relative(retention: float, usd: float, teacher_digest: str) -> Relative:
    overall = Estimate(value=retention, low=retention - 0.05, high=retention + 0.05)
    return Relative(
        teacher="m/1",
        teacher_digest=teacher_digest,
        retention=overall,
        task_retention={"single": overall.model_copy(update={"value": retention - 0.1})},
        difference={},
        cost_ratio=usd / 2,
        speedup=2 / usd,
    )


HERE = "a processor, 2 cores, Linux; torch 1"
# What is measured differently -> changes for `changes_of_card`, and how the difference is described.
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "tasks": ({"tasks_digest": "others", "tasks": {"other": None}}, "scored on other"),
    "task version": ({"tasks_digest": "others", "tasks": {"single": {"task_hash": "new"}}}, "another version"),
    "limit": (
        {"tasks_digest": "others", "tasks": {"single": {"task_hash": "new", "documents": 5}}},
        "5 documents of single, not 9",
    ),
    "sample": (
        {"tasks_digest": "others", "tasks": {"single": {"task_hash": "new", "of_documents": 20, "limit_seed": 3}}},
        "the sample with seed 3 of single, not all documents",
    ),
    "prompts": ({"prompts_digest": "q", "tasks": {"single": {"prompt_hash": "q"}}}, "other prompts of single"),
    "harness": ({"harness": "lm-eval 1"}, "scored with lm-eval 1, not lm-eval 0"),
    "teacher": ({"teacher": "f" * 64}, "against other files of m/1 as the teacher"),
    "machine": (
        {"cost_fields": {"machine": "b processor, 4 cores, Linux; torch 1"}},
        "cost measured on b processor, 4 cores, Linux, not on a processor, 2 cores, Linux",
    ),
    "threads": ({"cost_fields": {"threads": 2}}, "cost measured with 2 threads, not with 1 thread"),
    "request": ({"cost_fields": {"new_tokens": 8}}, "for 64 tokens in and 8 out"),
    "price": ({"cost_fields": {"usd_per_hour": 3.0}}, "at $3 an hour, not at $1 an hour"),
    "protocol": ({"cost_fields": {"protocol": 9}}, "by protocol 9, not by protocol 2"),
}


def changes_of_card(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes for `make_card`: changed fields of tasks become whole results, and costs are measured HERE."""
    changes = {**changes, "cost_fields": {"machine": HERE} | changes.get("cost_fields", {})}
    if tasks := changes.get("tasks"):
        changes["tasks"] = {n: TASKS["single"].model_copy(update=update or {}) for n, update in tasks.items()}
        changes["tasks"] |= {n: TASKS[n] for n in ("group", "sub") if "single" in tasks}
    return changes
