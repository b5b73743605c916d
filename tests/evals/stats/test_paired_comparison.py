"""Comparison of a candidate with a reference: per task, over all tasks, and corrected by Holm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from limbeck.evals.stats.diagnostics import DIAGNOSTIC_COLUMNS
from limbeck.evals.stats.noninferiority import Margins, holm_adjusted_p_values
from limbeck.evals.stats.paired_comparison import compare_to_reference, correct_candidates
from limbeck.evals.stats.retention import compare_with_teacher, pair_documents
from limbeck.registry.core.errors import BadInput
from tests.evals.document_tables import documents, result


@pytest.fixture(scope="module")
def three_tasks() -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """Documents of candidate and reference, and results: two choice tasks that share files, one a group; and bits."""
    random = np.random.default_rng(0)
    ours, theirs, tasks = [], [], {}
    for name, count, group in (("one", 60, None), ("two_a", 80, "two"), ("two_b", 40, "two"), ("bits", 50, None)):
        files = [f"file{i % 20}.py" for i in range(count)]
        reference = (random.random(count) < 0.8).astype(float)
        candidate = np.where(random.random(count) < 0.15, random.random(count) < 0.5, reference)
        if name == "bits":
            reference, candidate = reference + 1, reference + 1.2 + 0.05 * random.normal(size=count)
        ours.append(documents(name, candidate, files))
        theirs.append(documents(name, reference, files))
        changes: dict[str, Any] = {"chance": 0.5} if name == "one" else {}
        if name == "bits":
            changes = dict(metric="bits_per_byte", higher_is_better=False, chance=8.0)
        tasks[name] = result(theirs[-1], group=group, **changes)
    tasks["two"] = result(pa.concat_tables(theirs[1:3]))
    return pa.concat_tables(ours), pa.concat_tables(theirs), tasks


def test_macro_and_pooled_cover_the_tasks_of_one_metric(three_tasks: Any) -> None:
    ours, theirs, tasks = three_tasks
    comparison = compare_to_reference(
        pair_documents(ours, theirs, DIAGNOSTIC_COLUMNS), tasks, Margins.parse(["0.1", "one=0.2"]), ("m/2", "m/1")
    )
    assert {row.task for row in comparison.tasks} == {"one", "two", "bits"}
    assert [(row.task, row.metric, set(row.tasks)) for row in comparison.over_all] == [
        ("macro", "acc", {"one", "two"}),
        ("pooled", "acc", {"one", "two"}),
    ]
    by_name = {row.task: row for row in [*comparison.tasks, *comparison.over_all]}
    one, two, macro, pooled = (by_name[name] for name in ("one", "two", "macro", "pooled"))
    assert (one.noninferiority.margin, two.noninferiority.margin, macro.noninferiority.margin) == (0.2, 0.1, 0.1)
    assert macro.difference.value == pytest.approx((one.difference.value + two.difference.value) / 2)
    assert pooled.difference.value == pytest.approx((60 * one.difference.value + 120 * two.difference.value) / 180)
    assert pooled.candidate - pooled.reference == pytest.approx(pooled.difference.value)
    assert (macro.documents, pooled.documents, pooled.clusters) == (180, 180, 20)
    assert one.retention
    assert two.retention
    assert macro.retention
    assert pooled.retention
    assert macro.retention.value == pytest.approx((one.retention.value + two.retention.value) / 2)
    chance = (60 * 0.5 + 120 * 0.25) / 180
    assert pooled.retention.value == pytest.approx((pooled.candidate - chance) / (pooled.reference - chance))
    found = compare_with_teacher(ours, theirs, tasks)
    assert comparison.retention == found.retention
    assert one.difference == found.difference["one"]
    assert by_name["bits"].better == "m/1"  # fewer bits per byte
    assert by_name["bits"].noninferiority.uncorrected == "fail"


def test_macro_error_counts_that_tasks_share_files() -> None:
    random = np.random.default_rng(1)
    files = [f"file{i}.py" for i in range(60)]
    shared, zeros = random.normal(size=60), np.zeros(60)

    def macro_stderr(second: np.ndarray) -> float:
        ours = pa.concat_tables([documents("a", shared, files), documents("b", second, files)])
        theirs = pa.concat_tables([documents(name, zeros, files) for name in "ab"])
        tasks = {name: result(documents(name, zeros, files)) for name in "ab"}
        pairs = pair_documents(ours, theirs, DIAGNOSTIC_COLUMNS)
        return compare_to_reference(pairs, tasks, Margins(), ("x", "y")).over_all[0].stderr

    alone = shared.std(ddof=1) / np.sqrt(60)
    assert macro_stderr(shared) == pytest.approx(alone)  # the second task adds nothing
    assert macro_stderr(-shared) == pytest.approx(0, abs=1e-12)


def test_holm_corrects_over_candidates(three_tasks: Any) -> None:
    ours, theirs, tasks = three_tasks
    rows = compare_to_reference(
        pair_documents(ours, theirs, DIAGNOSTIC_COLUMNS), tasks, Margins(0.12), ("m/2", "m/1")
    ).tasks
    same = compare_to_reference(
        pair_documents(theirs, theirs, DIAGNOSTIC_COLUMNS), tasks, Margins(0.12), ("m/3", "m/1")
    ).tasks
    families = correct_candidates([rows, same])
    largest = [max(row.noninferiority.p_value for row in each) for each in (rows, same)]
    found = [max(row.noninferiority.p_holm for row in each) for each in families]
    assert found == pytest.approx(holm_adjusted_p_values(largest))
    assert [len(family) for family in families] == [3, 3]


def test_a_task_of_one_cluster_cannot_be_tested() -> None:
    table = documents("t", [0.0, 1.0, 1.0], ["one.py"] * 3)
    comparison = compare_to_reference(
        pair_documents(table, table, DIAGNOSTIC_COLUMNS), {"t": result(table)}, Margins(), ("a", "b")
    )
    assert comparison.tasks == []
    assert "two groups" in comparison.unknown_tasks["t"]


def test_documents_that_do_not_pair_are_named(three_tasks: Any) -> None:
    ours, theirs, _ = three_tasks
    with pytest.raises(BadInput, match=r"m/2 and m/1 were not scored on .*: documents bits 49 of m/1 alone"):
        pair_documents(ours.slice(0, len(ours) - 1), theirs, DIAGNOSTIC_COLUMNS, ("m/2", "m/1"))
