"""Versions with real scorecards and documents in a real store, to decide on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from limbeck.evals.cost.measure import median_estimate
from limbeck.evals.stats.retention import compare_with_teacher
from limbeck.evals.verdict.records import Candidate, VerdictReport
from limbeck.registry.mlflow.runs import TRAINING_COST_TAG
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, Relative, Scorecard, TaskResult, TrainingCost, Version
from tests.evals.document_tables import documents, result
from tests.evals.timed_costs import timed_cost

DOCUMENTS = 2000
TRAINING_COST = TrainingCost(training_seconds=3600, tokens=10, machine="a test machine, 2 cores")
RATIO_NOISE = np.array([1, 1.01, 0.99, 1, 1.01, 0.99])  # of a cost ratio, round by round

Scores = dict[str, np.ndarray]  # task -> the value of each document
AddScored = Callable[..., Version]


def answers(count: int, lost: int = 0, won: int = 0) -> np.ndarray:
    """(count,) scores, 1 for a right answer: the teacher's, of which 80% are right, with `lost` and `won` changed."""
    right = np.arange(count) % 5 > 0
    scores = right.astype(float)
    scores[np.flatnonzero(right)[:lost]] = 0
    scores[np.flatnonzero(~right)[:won]] = 1
    return scores


def documents_of(scores: Scores, one_cluster: Sequence[str] = ()) -> pa.Table:
    """The documents of several tasks; those of a task in `one_cluster` come from one file."""
    tables = []
    for task, values in scores.items():
        clusters = [task if task in one_cluster else f"{task}{number}" for number in range(len(values))]
        tables.append(documents(task, values, clusters))
    return pa.concat_tables(tables)


def results_of(scores: Scores) -> dict[str, TaskResult]:
    """The result of each task."""
    return {task: result(documents(task, values), task_hash=task, prompt_hash=task) for task, values in scores.items()}


def candidate_of(report: VerdictReport, version: Version) -> Candidate:
    """A version as the verdict has it."""
    return next(each for each in report.candidates if each.version == version.ref)


@pytest.fixture
def add_scored(store: Store, tmp_path: Path) -> AddScored:
    """A function that registers and scores another version of m; the first one is the teacher of the others.

    It takes the version's answers (None: no scorecard) and its cost as a factor of the teacher's. Options: `alone` for
    a scorecard that is not compared with the teacher, `card` for other fields of the scorecard, `training_cost`,
    `one_cluster` for tasks whose documents come from one file; the rest are fields of the version.
    """
    teachers: list[tuple[str, str, Scores]] = []

    def relative(scores: Scores, factor: float | None) -> Relative:
        label, digest, teacher_scores = teachers[0]
        found = compare_with_teacher(documents_of(scores), documents_of(teacher_scores), results_of(teacher_scores))
        return Relative(
            teacher=label,
            teacher_digest=digest,
            retention=found.retention,
            task_retention=found.task_retention,
            difference=found.difference,
            cost_ratio=factor,
            speedup=1 / factor if factor else None,
            cost_ratio_interval=median_estimate(factor * RATIO_NOISE) if factor else None,
            teacher_cost=timed_cost(1.0) if factor else None,
        )

    def register(name: str, training_cost: TrainingCost | None, **fields: Any) -> Version:
        if training_cost:
            with store.runs.start("train") as training:
                store.client.set_tag(training.id, TRAINING_COST_TAG, training_cost.model_dump_json())
            fields["run_id"] = training.id
        folder = tmp_path / f"{name}-{len(store.versions(name))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"of": folder.name}))
        return store.register(NewVersion(name=name, **{"kind": "student", **fields}), folder)

    def add(scores: Scores | None = None, factor: float | None = None, name: str = "m", **options: Any) -> Version:
        alone, one_cluster = options.pop("alone", False), options.pop("one_cluster", ())
        changes, training_cost = options.pop("card", {}), options.pop("training_cost", None)
        version = register(name, training_cost, **options)
        if scores is None:
            return version
        file = tmp_path / "documents.parquet"
        parquet.write_table(documents_of(scores, one_cluster), file)
        card: dict[str, Any] = {
            "artifact": version.digest,
            "model": version.ref,
            "tasks": results_of(scores),
            "tasks_digest": "+".join(scores),
            "prompts_digest": "+".join(scores),
            "harness": "lm-eval 0",
            "created": datetime(2026, 1, version.version, tzinfo=UTC),
            "cost": timed_cost(factor) if factor else None,
            "relative": relative(scores, factor) if teachers and not alone else None,
        }
        store.findings.add_scorecard(version, Scorecard.model_validate(card | changes), file)
        teachers.append((version.ref, version.digest, scores))
        return version

    return add


def add_teacher(add_scored: AddScored, tasks: Sequence[str] = ("qa",)) -> Version:
    """Register and score the teacher m/1."""
    return add_scored({task: answers(DOCUMENTS) for task in tasks}, 1.0, kind="teacher")
