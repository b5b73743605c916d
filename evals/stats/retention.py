"""Retention: the share of a teacher's quality that a student keeps, with confidence intervals.

Errors are clustered by groups of documents. Student and teacher answer the same documents, so they are compared
document by document (Miller, "Adding Error Bars to Evals", arXiv 2411.00640). `evals.stats.estimates` has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from limbeck.evals.stats.estimates import (
    ClusteredEstimate,
    Difference,
    cluster_codes,
    clustered_difference,
    clustered_mean,
)
from limbeck.evals.stats.ratio import Ratio, mean_ratio
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import Estimate, TaskResult, top_level_tasks

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SIDES = ("student", "teacher")
DOCUMENT_KEY = ["task", "doc_id", "doc_hash", "prompt_hash"]  # what makes two documents the same


class TeacherComparison(NamedTuple):
    """A student compared with its teacher."""

    retention: Estimate | None  # mean over the top-level tasks that have one
    task_retention: dict[str, Estimate]
    difference: dict[str, Estimate]  # student minus teacher, in the metric's own units
    left_out: dict[str, str]  # task -> why it has no retention


def mean_and_stderr(
    values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray, clusters: Sequence[Any] | np.ndarray
) -> tuple[float, float | None]:
    """Weighted mean of N documents and its cluster-robust standard error; None if there is only one cluster."""
    estimate = clustered_mean(np.asarray(values, np.float64), np.asarray(weights, np.float64), cluster_codes(clusters))
    return estimate.value, None if np.isnan(estimate.stderr) else estimate.stderr


def compare_with_teacher(student: pa.Table, teacher: pa.Table, tasks: Mapping[str, TaskResult]) -> TeacherComparison:
    """Compare two models document by document.

    The retention of a task is (student - chance) / (teacher - chance): the share of the teacher's quality above what
    costs nothing (`limbeck.evals.tasks.chance`) that the student keeps. It holds for metrics with lower values better
    too: for bits per byte it is the share of the teacher's saving over the best compressor. Without a chance level it
    is student / teacher, or teacher / student if lower is better. Its interval is that of `limbeck.evals.stats.ratio`.
    A task is left out if the teacher's interval reaches chance, since there is nothing to keep. The mean counts each
    top-level task once; a file that two tasks use is one cluster in it, so their covariance counts.

    Args:
        student, teacher: the `documents` of `limbeck.evals.scores.harness.score_model`.
        tasks: the teacher's results.

    Raises:
        BadInput: documents that do not pair, by name.
    """
    return compare_pairs(pair_documents(student, teacher), tasks)


def compare_pairs(
    pairs: pd.DataFrame, tasks: Mapping[str, TaskResult], reference: str = "the teacher"
) -> TeacherComparison:
    """As `compare_with_teacher`, for the result of `pair_documents`; `reference` names the teacher in messages."""
    differences: dict[str, Estimate] = {}
    retentions: dict[str, Ratio] = {}
    left_out: dict[str, str] = {}
    for name, result in tasks.items():
        rows = pairs[pairs["task"].isin(leaf_tasks(name, tasks))]
        if rows["code"].nunique() < 2:
            left_out[name] = "a confidence interval needs documents of two groups or more"
            continue
        weights, clusters = rows["weight"].to_numpy(), rows["code"].to_numpy()
        difference = paired_difference(rows)
        differences[name] = difference.interval()
        student, teacher = (clustered_mean(rows[side].to_numpy(), weights, clusters) for side in SIDES)
        if _is_above_chance(teacher, result):
            retentions[name] = _retention(student, teacher, difference, result)
        else:
            interval = teacher.interval()
            left_out[name] = (
                f"retention is undefined: {reference}'s {result.metric} of {interval.value:.4g} [{interval.low:.4g}, "
                f"{interval.high:.4g}] is not clearly better than chance, {result.chance or 0:.4g}"
                + (f" ({result.chance_source})" if result.chance_source else "")
                + ", so there is nothing to keep"
            )
    top = [retentions[name] for name in top_level_tasks(tasks) if name in retentions]
    return TeacherComparison(
        retention=mean_ratio(top) if top else None,
        task_retention={name: ratio.interval() for name, ratio in retentions.items()},
        difference=differences,
        left_out=left_out,
    )


def check_numbers(documents: pa.Table, model: str) -> None:
    """Raise BadInput, naming the documents, if a score is NaN or infinite."""
    broken = documents.to_pandas()[~np.isfinite(documents["value"].to_numpy())]
    if len(broken):
        raise BadInput(
            f"the scores of {model} on {_name_documents(broken)} are NaN or infinite",
            fix="check the weights: how the model was trained or exported",
        )


def leaf_tasks(name: str, tasks: Mapping[str, TaskResult]) -> list[str]:
    """The tasks of a group, or the task itself."""
    return [other for other, result in tasks.items() if result.group == name] or [name]


def pair_documents(
    student: pa.Table,
    teacher: pa.Table,
    columns: Sequence[str] = (),
    names: Sequence[str] = ("the student", "the teacher"),
) -> pd.DataFrame:
    """One row for each document: DOCUMENT_KEY, student and teacher (their values), weight, cluster, and its code.

    Args:
        columns: more columns, of both models: "response" becomes student_response and teacher_response.
        names: of the two models in errors.

    Raises:
        BadInput: the two were not scored on the same documents, by name.
    """
    students = _side(student, [*DOCUMENT_KEY, "value"], columns, "student")
    teachers = _side(teacher, [*DOCUMENT_KEY, "value", "weight", "cluster"], columns, "teacher")
    pairs = students.merge(teachers, how="outer", on=DOCUMENT_KEY, indicator=True)
    single = pairs[pairs["_merge"] != "both"]
    if len(single):
        sides = {"left_only": f"of {names[0]} alone", "right_only": f"of {names[1]} alone"}
        groups = single.groupby("_merge", observed=True)
        named = "; ".join(f"{_name_documents(rows)} {sides[str(side)]}" for side, rows in groups)
        raise BadInput(
            f"{' and '.join(names)} were not scored on the same documents: {named}",
            fix="score both again on the same tasks: add --force",
        )
    return pairs.assign(code=cluster_codes(pairs["cluster"])).drop(columns="_merge")


def paired_difference(pairs: pd.DataFrame) -> Difference:
    """Student minus teacher, over rows of `pair_documents`."""
    student, teacher, weights, clusters = (pairs[name].to_numpy() for name in (*SIDES, "weight", "code"))
    return clustered_difference(student, teacher, weights, clusters)


def _side(table: pa.Table, required: Sequence[str], columns: Sequence[str], side: str) -> pd.DataFrame:
    """One model's columns; the value and the `columns` are renamed after the side."""
    frame = table.select([*required, *columns]).to_pandas()
    return frame.rename(columns={"value": side} | {name: f"{side}_{name}" for name in columns})


def _is_above_chance(teacher: ClusteredEstimate, result: TaskResult) -> bool:
    """Whether the teacher's whole interval is better than chance, or above 0 if the metric has no chance level."""
    interval = teacher.interval()
    if result.chance is None:
        return interval.low > 0
    return interval.low > result.chance if result.higher_is_better else interval.high < result.chance


def _retention(
    student: ClusteredEstimate, teacher: ClusteredEstimate, difference: Difference, result: TaskResult
) -> Ratio:
    """What the student keeps of the teacher's quality above chance; `difference` is student minus teacher."""
    if result.higher_is_better:
        chance = result.chance or 0.0
        return Ratio(_shifted(student, -chance), _shifted(teacher, -chance), difference, chance)
    if result.chance is None:
        return Ratio(teacher, student, difference.negate())
    kept, whole = (_shifted(each.negate(), result.chance) for each in (student, teacher))
    return Ratio(kept, whole, difference.negate(), 1 - result.chance)  # the chance that an error rate is no error


def _shifted(estimate: ClusteredEstimate, by: float) -> ClusteredEstimate:
    return replace(estimate, value=estimate.value + by)


def _name_documents(rows: pd.DataFrame) -> str:
    """The first four documents of a table and the number of the others, for a message."""
    shown = [f"{row.task} {row.doc_id}" for row in rows.head(4).itertuples()]
    more = f" and {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
    return f"documents {', '.join(shown)}{more}"
