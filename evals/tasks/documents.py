"""What is kept of each document that a model was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from limbeck.evals.tasks.task_set import Metric

MAX_TEXT_CHARACTERS = 1000  # characters kept of a target and of a response
PROMPT_END = 300  # characters kept of a prompt, its last
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
        # For people and for diagnostics; files of older scorecards lack them, and each may be null.
        "target": pa.string(),  # the right choice, or what should be said; several are joined by " | "
        "response": pa.string(),  # the choice taken by this metric, or the first text generated
        "choice_logprobs": pa.list_(pa.float64()),  # nats of each choice, in order; multiple_choice only
        "choice_lengths": pa.list_(pa.int64()),  # characters of each choice; multiple_choice only
        "prompt_end": pa.string(),
    }
)


def document_table(task: Task, metric: Metric, samples: Sequence[dict[str, Any]]) -> pa.Table:
    """A task's samples, as lm-eval logs them, by the columns of DOCUMENTS."""
    rows = []
    for sample in samples:
        if sample["filter"] != metric.filter or metric.name not in sample:
            continue
        value, weight = sample[metric.name], 1.0
        if isinstance(value, tuple):  # log-probability and size, of which bits per byte are made
            nats, weight = value
            value = -nats / weight / np.log(2)
        doc = sample["doc"]
        path = doc.get("path") if isinstance(doc, dict) else None
        rows.append(
            {
                "task": task.task_name,
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "prompt_hash": sample["prompt_hash"],
                "metric": metric.name,
                "value": float(value),
                "weight": float(weight),
                "cluster": str(path or f"{task.task_name}:{sample['doc_id']}"),
                "prompt_end": str(sample["arguments"][0][0])[-PROMPT_END:],
                **_answer(task, metric, sample),
            }
        )
    return pa.Table.from_pylist(rows, DOCUMENT_SCHEMA)


def _answer(task: Task, metric: Metric, sample: dict[str, Any]) -> dict[str, Any]:
    """What was asked for and what the model said, by the columns of DOCUMENTS."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return _choice(task, metric, sample)
    if task.OUTPUT_TYPE == "generate_until":
        return {"target": _text(sample["target"]), "response": _text(sample["resps"][0][0])}
    return {"target": _text(sample["target"])} if task.OUTPUT_TYPE == "loglikelihood" else {}


def _choice(task: Task, metric: Metric, sample: dict[str, Any]) -> dict[str, Any]:
    """As lm-eval's `process_results` takes the choice."""
    doc = sample["doc"]
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    logprobs = [float(logprob) for logprob, _ in sample["filtered_resps"]]
    given, alone = logprobs[: len(choices)], logprobs[len(choices) :]
    sizes = {"acc_norm": map(len, choices), "acc_bytes": (len(choice.encode()) for choice in choices)}
    merit = np.array(given)
    if metric.name in sizes:
        merit = merit / list(sizes[metric.name])
    elif metric.name == "acc_mutual_info":
        merit = merit - alone
    # Where each choice makes a prompt of its own, its number stands in the place of the text.
    target = task.doc_to_text(doc) if task.multiple_input else sample["target"]
    right = [choices[one] if isinstance(one, int) and 0 <= one < len(choices) else one for one in _as_list(target)]
    return {
        "target": _text(right),
        "response": _text(choices[int(merit.argmax())]),
        "choice_logprobs": given,
        "choice_lengths": [len(choice) for choice in choices],
    }


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _text(value: Any) -> str:
    return " | ".join(map(str, _as_list(value)))[:MAX_TEXT_CHARACTERS]
