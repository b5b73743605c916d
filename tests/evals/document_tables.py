"""Documents tables, as a scorecard stores them, and task results made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from limbeck.evals.stats.retention import mean_and_stderr
from limbeck.evals.tasks.documents import DOCUMENT_SCHEMA
from limbeck.registry.records import TaskResult


def documents(
    task: str | Sequence[str],
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
    **columns: Any,
) -> pa.Table:
    """A table of one row for each value, in the columns of `DOCUMENT_SCHEMA`.

    Args:
        task: the task of all rows, or of each.
        clusters: each row is a cluster of its own if None.
        weights: 1 if None.
        columns: other columns; those that are left out are null.
    """
    count = len(values)
    tasks = [task] * count if isinstance(task, str) else list(task)
    data = {
        "task": tasks,
        "doc_id": list(range(count)),
        "doc_hash": [f"{name}-{number}" for number, name in enumerate(tasks)],
        "prompt_hash": [f"p-{name}-{number}" for number, name in enumerate(tasks)],
        "metric": ["acc"] * count,
        "value": np.asarray(values, np.float64),
        "weight": np.ones(count) if weights is None else np.asarray(weights, np.float64),
        "cluster": [str(cluster) for cluster in (range(count) if clusters is None else clusters)],
    } | columns
    arrays = [pa.array(data.get(field.name, [None] * count), field.type) for field in DOCUMENT_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=DOCUMENT_SCHEMA)


def result(table: pa.Table, **changes: Any) -> TaskResult:
    """The result of a task with the documents of `table`."""
    value, stderr = mean_and_stderr(table["value"], table["weight"], table["cluster"])
    fields = dict(metric="acc", value=value, stderr=stderr, higher_is_better=True, documents=len(table), chance=0.25)
    return TaskResult.model_validate({**fields, "task_hash": "t", "prompt_hash": "p", **changes})
