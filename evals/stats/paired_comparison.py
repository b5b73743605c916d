"""Compares a candidate with its reference, by task and over all tasks: from paired documents to records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from limbeck.evals.stats.diagnostics import compare_answers
from limbeck.evals.stats.estimates import Difference, average_differences
from limbeck.evals.stats.noninferiority import Margins, correct_over_candidates, noninferiority_test
from limbeck.evals.stats.retention import compare_pairs, leaf_tasks, paired_difference
from limbeck.registry.records import ComparedTask, Estimate, TaskResult, top_level_tasks

if TYPE_CHECKING:
    import pandas as pd


class PairedComparison(NamedTuple):
    """A candidate compared with its reference; `correct_candidates` corrects for the number of candidates."""

    tasks: list[ComparedTask]  # top-level tasks and groups
    over_all: list[ComparedTask]  # macro, then pooled, for each metric that several tasks share
    unknown_tasks: dict[str, str]  # task -> why it cannot be tested
    retention: Estimate | None  # mean over the tasks that have one
    differences: dict[str, Difference]  # task -> candidate minus reference


def compare_to_reference(
    pairs: pd.DataFrame, tasks: Mapping[str, TaskResult], margins: Margins, names: tuple[str, str]
) -> PairedComparison:
    """Compare a candidate with its reference.

    Macro is the mean of the tasks' differences; pooled is the difference over all their documents together. Both
    combine tasks of one metric only: differences of accuracies and of bits per byte do not add.

    Args:
        pairs: of `pair_documents` with DIAGNOSTIC_COLUMNS; the student is the candidate.
        tasks: the reference's results.
        margins: how much worse the candidate may be.
        names: of the candidate and of the reference.
    """
    found = compare_pairs(pairs, tasks, names[1])
    top = top_level_tasks(tasks)
    subjects: dict[str, _RowSubject] = {}
    for name in top:
        rows = pairs[pairs["task"].isin(leaf_tasks(name, tasks))]
        if name in found.difference:
            retention, why = found.task_retention.get(name), found.left_out.get(name)
            difference = paired_difference(rows)
            subjects[name] = _RowSubject(name, (name,), tasks[name], rows, difference, *_means(rows), retention, why)
    by_metric: dict[tuple[str, bool], list[_RowSubject]] = {}
    for each in subjects.values():
        by_metric.setdefault((each.result.metric, each.result.higher_is_better), []).append(each)
    over_all = [
        row
        for parts in by_metric.values()
        if len(parts) > 1
        for row in _macro_and_pooled(parts, pairs, tasks, names[1])
    ]
    return PairedComparison(
        tasks=[_row(each, margins, names) for each in subjects.values()],
        over_all=[_row(each, margins, names) for each in over_all],
        unknown_tasks={name: found.left_out[name] for name in top if name not in subjects},
        retention=found.retention,
        differences={name: each.difference for name, each in subjects.items()},
    )


def correct_candidates(families: Iterable[Sequence[ComparedTask]]) -> list[list[ComparedTask]]:
    """The rows of several candidates, corrected for the number of candidates."""
    families = [list(rows) for rows in families]
    corrected = correct_over_candidates([[row.noninferiority for row in rows] for rows in families])
    return [
        [row.model_copy(update={"noninferiority": test}) for row, test in zip(rows, tests, strict=True)]
        for rows, tests in zip(families, corrected, strict=True)
    ]


class _RowSubject(NamedTuple):
    """The data of one row: a task, or several tasks together."""

    task: str
    parts: tuple[str, ...]
    result: TaskResult
    rows: pd.DataFrame
    difference: Difference
    candidate: float
    reference: float
    retention: Estimate | None
    no_retention: str | None  # why it has no retention


def _macro_and_pooled(
    parts: Sequence[_RowSubject], pairs: pd.DataFrame, tasks: Mapping[str, TaskResult], reference: str
) -> Iterator[_RowSubject]:
    """Tasks of one metric together: their macro average, then their documents pooled."""
    names = tuple(part.task for part in parts)
    inner = [leaf for name in names for leaf in leaf_tasks(name, tasks)]
    rows = pairs[pairs["task"].isin(inner)]
    found = compare_pairs(rows, {name: tasks[name] for name in (*names, *inner)})
    candidate, reference_mean = (
        float(np.mean([getattr(part, side) for part in parts])) for side in ("candidate", "reference")
    )
    why = None if found.retention else "none of its tasks has one"
    mean = average_differences([part.difference for part in parts])
    yield _RowSubject("macro", names, parts[0].result, rows, mean, candidate, reference_mean, found.retention, why)

    # Pooled is a group of all tasks; its chance level is the mean over its documents.
    weights = [float(part.rows["weight"].sum()) for part in parts]
    known = [part.result.chance for part in parts if part.result.chance is not None]
    chance = float(np.average(known, weights=weights)) if len(known) == len(parts) else None
    group = parts[0].result.model_copy(update={"chance": chance, "group": None})
    members = {leaf: tasks[leaf].model_copy(update={"group": "pooled"}) for leaf in inner}
    found = compare_pairs(rows, {"pooled": group, **members}, reference)
    retention, why = found.task_retention.get("pooled"), found.left_out.get("pooled")
    yield _RowSubject("pooled", names, group, rows, paired_difference(rows), *_means(rows), retention, why)


def _means(rows: pd.DataFrame) -> tuple[float, float]:
    """The weighted means of the candidate and of the reference."""
    student, teacher = (float(np.average(rows[side], weights=rows["weight"])) for side in ("student", "teacher"))
    return student, teacher


def _row(subject: _RowSubject, margins: Margins, names: tuple[str, str]) -> ComparedTask:
    interval, clusters = subject.difference.interval(), subject.rows["code"].nunique()
    better = None
    if not interval.low <= 0 <= interval.high:
        better = names[0] if (interval.value > 0) == subject.result.higher_is_better else names[1]
    return ComparedTask(
        task=subject.task,
        tasks=subject.parts,
        metric=subject.result.metric,
        higher_is_better=subject.result.higher_is_better,
        documents=len(subject.rows),
        clusters=clusters,
        candidate=subject.candidate,
        reference=subject.reference,
        difference=interval,
        stderr=subject.difference.estimate.stderr,
        better=better,
        retention=subject.retention,
        no_retention=subject.no_retention,
        noninferiority=noninferiority_test(
            subject.difference,
            margins.margin_for(subject.task, subject.result.metric),
            higher_is_better=subject.result.higher_is_better,
            documents=len(subject.rows),
            clusters=clusters,
        ),
        answers=compare_answers(subject.rows),
    )
