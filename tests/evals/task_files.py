"""Tasks of lm-eval, written as YAML files with their data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], **config: Any) -> None:
    """Write a task as YAML (JSON is YAML): multiple choice by `acc`, unless `config` changes it."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    choice = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    metrics = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    task |= {"test_split": "test", "output_type": "multiple_choice", **choice, **metrics, **config}
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def questions(count: int) -> list[dict[str, Any]]:
    """Documents with two choices each; the second is right."""
    return [{"question": f"{n} + 1 =", "choices": [f" {n}", f" {n + 1}"], "label": 1} for n in range(count)]
