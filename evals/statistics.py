"""How sure a score is, and how much of a teacher's quality a student keeps. numpy and scipy.

Documents of one file are alike, so errors are clustered by it; student and teacher answer the same documents,
so they are compared document by document (Miller, "Adding Error Bars to Evals", arXiv 2411.00640).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from registry.errors import BadInput
from registry.records import Estimate, TaskResult

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

CONFIDENCE = 0.95
SIDES = ("student", "teacher")
KEY = ["task", "doc_id", "doc_hash", "prompt_hash"]  # what makes two documents the same


class Comparison(NamedTuple):
    """A student relative to its teacher."""

    retention: Estimate | None  # mean over the top-level tasks that have one
    task_retention: dict[str, Estimate]
    difference: dict[str, Estimate]  # student - teacher, in the metric's own units
    left_out: dict[str, str]  # task -> why it has no retention


def mean_and_stderr(
    values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray, clusters: Sequence[Any] | np.ndarray
) -> tuple[float, float | None]:
    """Weighted mean of N documents and its cluster-robust standard error.

    The mean is a ratio estimator, sum(w x) / sum(w); the error that of its linearization, summed within each
    of G clusters and scaled by G / (G - 1). None where there are fewer than two clusters.
    """
    estimate = _mean(np.asarray(values, np.float64), np.asarray(weights, np.float64), _codes(clusters))
    return estimate.value, estimate.stderr if estimate.freedom else None


def compare(student: pa.Table, teacher: pa.Table, tasks: Mapping[str, TaskResult]) -> Comparison:
    """Compare two models document by document.

    Retention of a task is (student - chance) / (teacher - chance): the share of what the teacher has above
    guessing that the student keeps. It serves metrics where lower is better too: with 8 bits per byte as
    chance it is the share of the teacher's saving over incompressible text. Where the metric has no chance it
    is student / teacher, or teacher / student where lower is better. Its interval is by the delta method on
    the paired documents. Where the teacher is not above chance (its own interval reaches it) there is nothing
    to keep: the task is left out. The mean takes each top-level task once; a file that two tasks use is one
    cluster in it, so that their covariance counts.

    Args:
        student, teacher: the `documents` of `evals.harness.score`.
        tasks: the teacher's results.

    Raises:
        BadInput: documents that do not pair; they are named.
    """
    pairs = _pair(student, teacher)
    codes = _codes(pairs["cluster"])
    differences, retentions, left_out = {}, {}, {}
    for name, result in tasks.items():
        rows = pairs["task"].isin(_leaves(name, tasks)).to_numpy()
        if len(np.unique(codes[rows])) < 2:
            left_out[name] = "it needs documents of two groups or more to tell how sure a score is"
            continue
        weights = pairs["weight"].to_numpy(np.float64)[rows]
        ours, theirs = (_mean(pairs[who].to_numpy(np.float64)[rows], weights, codes[rows]) for who in SIDES)
        differences[name] = _combine(ours.value - theirs.value, (1, ours), (-1, theirs))
        if _clear(theirs, result):
            retentions[name] = _retention(ours, theirs, result)
        else:
            sure = theirs.interval()
            left_out[name] = (
                f"the teacher's {result.metric} of {sure.value:.4g} [{sure.low:.4g}, {sure.high:.4g}] is not "
                f"clearly better than {result.chance or 0:.4g}, so there is nothing to keep"
            )
    top = [retentions[name] for name in top_level(tasks) if name in retentions]
    mean = float(np.mean([estimate.value for estimate in top])) if top else 0.0
    return Comparison(
        retention=_combine(mean, *((1 / len(top), estimate) for estimate in top)).interval() if top else None,
        task_retention={name: estimate.interval() for name, estimate in retentions.items()},
        difference={name: estimate.interval() for name, estimate in differences.items()},
        left_out=left_out,
    )


def check_numbers(documents: pa.Table, model: str) -> None:
    """Raise BadInput, naming the documents, where a score is NaN or infinite."""
    broken = documents.to_pandas()[~np.isfinite(documents["value"].to_numpy())]
    if len(broken):
        raise BadInput(f"the scores of {model} on {_named(broken)} are no numbers", fix="its logits are NaN there")


def top_level(tasks: Mapping[str, TaskResult]) -> list[str]:
    """The tasks that belong to no group that is scored too."""
    return [name for name, result in tasks.items() if result.group not in tasks]


@dataclass(frozen=True)
class _Estimate:
    """A number that is, near the truth, a sum over clusters.

    Attributes:
        value: the number.
        errors: (C,) float64, what each cluster adds to its error, small-sample factor included.
        freedom: degrees of freedom: the clusters it is of, less one.
    """

    value: float
    errors: np.ndarray
    freedom: int

    @property
    def stderr(self) -> float:
        return float(np.sqrt((self.errors**2).sum()))

    def interval(self) -> Estimate:
        from scipy.stats import t

        half = float(t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * self.stderr
        return Estimate(value=self.value, low=self.value - half, high=self.value + half, confidence=CONFIDENCE)


def _mean(values: np.ndarray, weights: np.ndarray, codes: np.ndarray) -> _Estimate:
    """Weighted mean of (N,) values of documents in clusters (N,)."""
    mean = float((weights * values).sum() / weights.sum())
    groups = len(np.unique(codes))
    factor = np.sqrt(groups / (groups - 1)) if groups > 1 else np.nan
    return _Estimate(mean, factor * np.bincount(codes, weights * (values - mean) / weights.sum()), groups - 1)


def _combine(value: float, *terms: tuple[float, _Estimate]) -> _Estimate:
    """A function of estimates, given its value and its derivative by each; as free as the least free."""
    errors = np.zeros(max(len(estimate.errors) for _, estimate in terms))
    for derivative, estimate in terms:
        errors[: len(estimate.errors)] += derivative * estimate.errors
    return _Estimate(value, errors, min(estimate.freedom for _, estimate in terms))


def _clear(teacher: _Estimate, result: TaskResult) -> bool:
    """Whether the teacher's whole interval is better than chance; above 0 where the metric has no chance."""
    interval = teacher.interval()
    if result.chance is None:
        return interval.low > 0
    return interval.low > result.chance if result.higher_is_better else interval.high < result.chance


def _retention(student: _Estimate, teacher: _Estimate, result: TaskResult) -> _Estimate:
    upper, lower = student, teacher
    if result.chance is None and not result.higher_is_better:
        upper, lower = teacher, student
    above = lower.value - (result.chance or 0.0)
    ratio = (upper.value - (result.chance or 0.0)) / above
    return _combine(ratio, (1 / above, upper), (-ratio / above, lower))


def _codes(clusters: Any) -> np.ndarray:
    """(N,) labels of any kind -> (N,) int64 from 0."""
    return np.unique(np.asarray(clusters), return_inverse=True)[1].reshape(-1)


def _leaves(name: str, tasks: Mapping[str, TaskResult]) -> list[str]:
    """The sub-tasks of a group, or the task itself."""
    return [other for other, result in tasks.items() if result.group == name] or [name]


def _pair(student: pa.Table, teacher: pa.Table) -> pd.DataFrame:
    """One row for each document: task, cluster, weight, student, teacher."""
    theirs = teacher.to_pandas().rename(columns={"value": "teacher"})
    ours = student.select([*KEY, "value"]).to_pandas().rename(columns={"value": "student"})
    pairs = ours.merge(theirs, how="outer", on=KEY, indicator=True)
    single = pairs[pairs["_merge"] != "both"]
    if len(single):
        sides = {"left_only": "of the student alone", "right_only": "of the teacher alone"}
        raise BadInput(
            "student and teacher were not asked the same documents: "
            + "; ".join(f"{_named(rows)} {sides[str(side)]}" for side, rows in single.groupby("_merge", observed=True)),
            fix="score both anew on the same tasks: add --force",
        )
    return pairs


def _named(rows: pd.DataFrame) -> str:
    """The first documents of a table, in words."""
    shown = [f"{row.task} {row.doc_id}" for row in rows.head(4).itertuples()]
    more = f" and {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
    return f"documents {', '.join(shown)}{more}"
