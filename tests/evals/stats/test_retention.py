"""Means, standard errors and retention, compared with statsmodels, and by simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import statsmodels.api as sm
from scipy import stats

from limbeck.evals.stats.estimates import cluster_codes, clustered_mean
from limbeck.evals.stats.retention import (
    check_numbers,
    compare_pairs,
    compare_with_teacher,
    mean_and_stderr,
    pair_documents,
)
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import TaskResult
from tests.evals.document_tables import documents, result


def clustered(random: np.random.Generator, clusters: int = 40, rho: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """(N,) cluster labels and (N,) values that correlate within clusters of unequal size."""
    labels = np.repeat(np.arange(clusters), random.integers(1, 9, clusters))
    return labels, np.sqrt(rho) * random.normal(size=clusters)[labels] + np.sqrt(1 - rho) * random.normal(
        size=len(labels)
    )


def jackknife(values: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean and CR3 standard error by statsmodels: HC3 of the weighted cluster means, times sqrt(1 - 1 / G)."""
    names = np.unique(labels)
    share = np.array([weights[labels == name].sum() for name in names])
    means = np.array([np.average(values[labels == name], weights=weights[labels == name]) for name in names])
    fit = sm.WLS(means, np.ones(len(names)), share).fit(cov_type="HC3")
    return fit.params[0], fit.bse[0] * np.sqrt(1 - 1 / len(names))


def test_mean_and_stderr_equal_statsmodels() -> None:
    random = np.random.default_rng(0)
    labels, values = clustered(random)
    weights = random.uniform(1, 5, len(values))
    expected = jackknife(values, weights, labels)
    assert mean_and_stderr(values, weights, [f"file{i}.py" for i in labels]) == pytest.approx(expected, rel=1e-12)


def test_clusters_of_equal_size_have_the_usual_cluster_robust_error() -> None:
    random = np.random.default_rng(10)
    labels = np.repeat(np.arange(20), 5)
    values = random.normal(size=20)[labels] + random.normal(size=100)
    fit = sm.OLS(values, np.ones(100)).fit(cov_type="cluster", cov_kwds={"groups": labels})
    assert mean_and_stderr(values, np.ones(100), labels) == pytest.approx((fit.params[0], fit.bse[0]), rel=1e-12)


def test_the_error_is_the_jackknife_over_clusters() -> None:
    random = np.random.default_rng(11)
    labels, values = clustered(random, clusters=7)
    without = np.array([values[labels != name].mean() for name in range(7)])
    _, stderr = mean_and_stderr(values, np.ones(len(values)), labels)
    assert stderr == pytest.approx(np.sqrt(6 / 7 * ((without - values.mean()) ** 2).sum()))


def test_the_error_of_independent_documents_is_the_usual_one() -> None:
    values = np.random.default_rng(1).normal(size=50)
    mean, stderr = mean_and_stderr(values, np.ones(50), range(50))
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(values.std(ddof=1) / np.sqrt(50))


def test_one_cluster_has_no_standard_error() -> None:
    assert mean_and_stderr([0.0, 1.0], [1, 1], ["a", "a"]) == (0.5, None)


def test_the_difference_is_paired_and_equals_statsmodels() -> None:
    random = np.random.default_rng(2)
    labels, shared = clustered(random)
    teacher, student = 5 + shared, 4.8 + shared + 0.1 * random.normal(size=len(labels))
    tables = documents("t", student, labels), documents("t", teacher, labels)
    # Rows may come in any order.
    tables = tables[0].take(random.permutation(len(labels))), tables[1]
    comparison = compare_with_teacher(*tables, {"t": result(tables[1])})
    value, stderr = jackknife(student - teacher, np.ones(len(labels)), labels)
    sizes = np.bincount(labels)
    half = stats.t.ppf(0.975, sizes.sum() ** 2 / (sizes**2).sum() - 1) * stderr
    found = comparison.difference["t"]
    assert found.value == pytest.approx(value, rel=1e-9)
    # At least Student's t; skewness and the worst file make it wider.
    assert half < found.high - value < 1.4 * half
    assert half < value - found.low < 1.4 * half
    unpaired = mean_and_stderr(student, np.ones(len(labels)), labels)[1]
    assert unpaired is not None
    assert found.high - found.low < unpaired  # pairing removes the shared part of the error


def test_a_model_retains_exactly_all_of_itself() -> None:
    table = documents("t", np.random.default_rng(3).random(30), range(30))
    found = compare_with_teacher(table, table, {"t": result(table)})
    assert found.retention is not None
    assert (found.retention.value, found.retention.low, found.retention.high) == (1.0, 1.0, 1.0)
    assert found.difference["t"].value == 0.0


@pytest.mark.parametrize(
    ("student", "teacher", "changes", "expected"),
    [
        (0.5, 0.75, {}, 0.5),  # above chance 0.25
        (3.0, 2.0, {"chance": 8.0, "higher_is_better": False}, 5 / 6),  # bits per byte
        (0.6, 0.8, {"chance": None}, 0.75),
        (20.0, 10.0, {"chance": None, "higher_is_better": False}, 0.5),  # a perplexity
        (0.9, 0.75, {}, 1.3),  # better than the teacher
    ],
)
def test_retention_by_hand(student: float, teacher: float, changes: dict[str, Any], expected: float) -> None:
    noise = 0.1 * np.tile([1.0, -1.0], 50)
    tables = documents("t", student + noise, range(100)), documents("t", teacher - noise, range(100))
    found = compare_with_teacher(*tables, {"t": result(tables[1], **changes)})
    assert found.task_retention["t"].value == pytest.approx(expected)
    assert found.task_retention["t"].low < expected < found.task_retention["t"].high
    assert found.retention == found.task_retention["t"]


def two_tasks(random: np.random.Generator, clusters: int = 40) -> tuple[Any, Any, dict[str, TaskResult], float]:
    """Student and teacher on a choice task and on bits per byte over the same files, and the true retention.

    Documents of one file have correlated difficulty, in both tasks and for both models.
    """
    hard = random.normal(size=clusters)
    students, teachers, tasks = [], [], {}
    for task in ("choice", "bits"):
        labels = np.repeat(np.arange(clusters), random.integers(1, 9, clusters))
        if task == "choice":
            logit = 0.7 * hard[labels]
            luck = random.random(len(labels))  # the same for both models, so their errors correlate
            base = 1 / (1 + np.exp(-logit))
            values = (luck < 0.25 + 0.5 * base).astype(float), (luck < 0.25 + 0.3 * base).astype(float)
            weights = np.ones(len(labels))
        else:
            weights = random.uniform(1, 4, len(labels))
            teacher = 2 + 0.3 * hard[labels] + 0.2 * random.normal(size=len(labels))
            values = teacher, teacher + 0.6 + 0.2 * hard[labels] + 0.2 * random.normal(size=len(labels))
        teachers.append(documents(task, values[0], labels, weights))
        students.append(documents(task, values[1], labels, weights))
        changes = {"chance": 8.0, "higher_is_better": False, "metric": "bits_per_byte"} if task == "bits" else {}
        tasks[task] = result(teachers[-1], **changes)
    return pa.concat_tables(students), pa.concat_tables(teachers), tasks, (0.6 + 5.4 / 6) / 2


def same_rows(student: pa.Table, teacher: pa.Table) -> pd.DataFrame:
    """What `pair_documents` returns for tables with the same rows in the same order, without its slow merge."""
    frame = pd.DataFrame({name: teacher[name].to_numpy() for name in ("task", "weight", "cluster")})
    sides = {"student": student["value"].to_numpy(), "teacher": teacher["value"].to_numpy()}
    return frame.assign(code=cluster_codes(frame["cluster"].to_numpy()), **sides)


def test_pairs_of_the_same_rows_need_no_merge() -> None:
    student, teacher, *_ = two_tasks(np.random.default_rng(4))
    paired, expected = same_rows(student, teacher), pair_documents(student, teacher)
    by_document = [*paired.columns]
    assert sorted(map(tuple, paired[by_document].to_numpy())) == sorted(map(tuple, expected[by_document].to_numpy()))


def test_95_percent_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(4)
    covered = []
    for _ in range(400):
        student, teacher, tasks, truth = two_tasks(random)
        found = compare_pairs(same_rows(student, teacher), tasks).retention
        assert found is not None
        covered.append(found.low <= truth <= found.high)
    # Three standard errors of 95% at 400 draws; more, since the lower bound also has to satisfy the difference's.
    assert 0.91 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_intervals_cover_the_truth_if_one_cluster_is_half_of_all(rho: float) -> None:
    random = np.random.default_rng(8)
    labels = np.repeat(np.arange(12), [4] * 11 + [44])
    codes, weights = labels, np.ones(len(labels))
    covered = 0
    for _ in range(1500):
        shared, own = random.normal(size=12)[labels], random.normal(size=len(labels))
        interval = clustered_mean(np.sqrt(rho) * shared + np.sqrt(1 - rho) * own, weights, codes).interval()
        covered += interval.low <= 0 <= interval.high
    # With the factor G / (G - 1) and G - 1 degrees of freedom it would be 83% at rho 0.3.
    assert covered / 1500 >= 0.94


def test_the_interval_agrees_with_a_cluster_bootstrap() -> None:
    random = np.random.default_rng(5)
    student, teacher, tasks, _ = two_tasks(random, clusters=120)
    found = compare_with_teacher(student, teacher, tasks).retention
    assert found is not None
    frame = teacher.to_pandas()
    files = frame["cluster"].unique()
    rows = {file: np.flatnonzero(frame["cluster"] == file) for file in files}
    task, weight = frame["task"].to_numpy(), frame["weight"].to_numpy()
    values = student["value"].to_numpy(), teacher["value"].to_numpy()
    means = []
    for _ in range(1000):
        drawn = np.concatenate([rows[file] for file in random.choice(files, len(files))])
        retained = []
        for name, result_of in tasks.items():
            of_task = drawn[task[drawn] == name]
            s, t = (np.average(v[of_task], weights=weight[of_task]) for v in values)
            retained.append((s - result_of.chance) / (t - result_of.chance))
        means.append(np.mean(retained))
    low, high = np.quantile(means, [0.025, 0.975])
    # One document of the choice task, 4e-3 here, is added to the bound.
    assert found.high - found.value == pytest.approx(high - np.mean(means), rel=0.2)
    assert found.low < low


def test_a_group_counts_once_and_pools_its_documents() -> None:
    random = np.random.default_rng(6)
    parts = {"a": 40, "b": 160, "single": 100}
    teacher = {name: documents(name, random.random(n) < 0.8, range(n)) for name, n in parts.items()}
    student = {name: documents(name, random.random(n) < 0.5, range(n)) for name, n in parts.items()}
    tables = pa.concat_tables(student.values()), pa.concat_tables(teacher.values())
    pooled = pa.concat_tables([teacher["a"], teacher["b"]])
    tasks = {name: result(table, group="group" if name != "single" else None) for name, table in teacher.items()}
    tasks["group"] = result(pooled)
    found = compare_with_teacher(*tables, tasks)

    def retention(table: Any, teacher_table: Any) -> float:
        return float((np.mean(table["value"]) - 0.25) / (np.mean(teacher_table["value"]) - 0.25))

    group = retention(pa.concat_tables([student["a"], student["b"]]), pooled)
    single = retention(student["single"], teacher["single"])
    assert found.task_retention["group"].value == pytest.approx(group)
    assert found.task_retention["a"].value == pytest.approx(retention(student["a"], teacher["a"]))
    assert found.retention is not None
    assert found.retention.value == pytest.approx((group + single) / 2)


def test_a_task_on_which_the_teacher_guesses_is_left_out() -> None:
    random = np.random.default_rng(7)
    good, guessed = (documents(name, random.random(200) < p, range(200)) for name, p in (("good", 0.8), ("bad", 0.27)))
    both = pa.concat_tables([good, guessed])
    tasks = {"good": result(good), "bad": result(guessed)}
    found = compare_with_teacher(both, both, tasks)
    assert found.retention == found.task_retention["good"]
    assert "bad" not in found.task_retention
    assert "retention is undefined" in found.left_out["bad"]
    assert "not clearly better than chance, 0.25" in found.left_out["bad"]
    assert found.difference["bad"].value == 0
    assert compare_with_teacher(guessed, guessed, {"bad": tasks["bad"]}).retention is None


def test_documents_that_do_not_pair_are_named() -> None:
    table = documents("t", np.arange(10.0), range(10))
    changed = table.set_column(3, "prompt_hash", pa.array([*table["prompt_hash"].to_pylist()[:9], "other"]))
    with pytest.raises(BadInput, match=r"t 9 of the student alone; documents t 9 of the teacher alone"):
        compare_with_teacher(changed, table, {"t": result(table)})
    with pytest.raises(BadInput, match=r"t 3, t 4, t 5, t 6 and 3 more of the teacher alone"):
        compare_with_teacher(table.slice(0, 3), table, {"t": result(table)})


def test_documents_with_nan_or_infinite_scores_are_named() -> None:
    check_numbers(documents("t", range(10), range(10)), "m/1")
    with pytest.raises(BadInput, match="the scores of m/1 on documents t 0, t 3 are NaN or infinite"):
        check_numbers(documents("t", [np.nan, 1, 2, np.inf], range(4)), "m/1")
