"""The documents of a task: their words, and their table in a scorecard, with one row for each that was scored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from limbeck.evals.tasks.output_types import output_type_of

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from limbeck.evals.tasks.metrics import Metric

# Scripts without spaces between words are split into characters.
_UNSPACED_SCRIPTS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f"
WORD = re.compile(rf"[{_UNSPACED_SCRIPTS}]|[^\W_{_UNSPACED_SCRIPTS}]+")
PROMPT_END_CHARACTERS = 300  # of a prompt in a documents table: its end
DOCUMENT_SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "doc_id": pa.int64(),
        "doc_hash": pa.string(),
        "prompt_hash": pa.string(),
        "metric": pa.string(),
        "value": pa.float64(),
        "weight": pa.float64(),
        "cluster": pa.string(),
        # For people and for diagnostics; each may be null.
        "target": pa.string(),  # the right choice or text; several are joined by " | "
        "response": pa.string(),  # the choice taken by this metric, or the first generated text
        "choice_logprobs": pa.list_(pa.float64()),  # nats of each choice, in order; multiple_choice only
        "choice_lengths": pa.list_(pa.int64()),  # characters of each choice; multiple_choice only
        "prompt_end": pa.string(),
    }
)


def document_text(task: Task, doc: Any) -> str:
    """A document's prompt without few-shot examples, and its right answer."""
    return " ".join(output_type_of(task).document_texts(task, doc))


def split_words(text: str) -> list[str]:
    """The words of a text in lower case; in scripts without spaces, its characters."""
    return WORD.findall(text.lower())


def document_table(
    task: Task, metric: Metric, samples: Sequence[dict[str, Any]], clusters: Mapping[int, str]
) -> pa.Table:
    """A task's samples, as lm-eval logs them, in the columns of `DOCUMENT_SCHEMA`.

    Args:
        clusters: document number -> cluster.
    """
    output_type = output_type_of(task)
    rows = []
    for sample in samples:
        if sample["filter"] != metric.filter or metric.name not in sample:
            continue
        value, weight = sample[metric.name], 1.0
        if isinstance(value, tuple):  # (log-probability, size in bytes) of a text: its bits per byte
            nats, weight = value
            value = -nats / weight / np.log(2) if weight else 0.0  # an empty text counts with weight 0
        rows.append(
            {
                "task": task.task_name,
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "prompt_hash": sample["prompt_hash"],
                "metric": metric.name,
                "value": float(value),
                "weight": float(weight),
                "cluster": clusters[sample["doc_id"]],
                "prompt_end": str(sample["arguments"][0][0])[-PROMPT_END_CHARACTERS:],
                **output_type.answer_columns(task, metric.name, sample),
            }
        )
    return pa.Table.from_pylist(rows, DOCUMENT_SCHEMA)
