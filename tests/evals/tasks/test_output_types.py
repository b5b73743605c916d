"""Output types: every one of lm-eval's has its class, an unknown one is refused, and no other module compares them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from limbeck.evals.tasks.output_types import OUTPUT_TYPES, output_type_of
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.core.errors import BadInput
from tests import ROOT

DOC = {"question": "1 + 1 =", "choices": ["2", "3", "4", "5"], "label": 0}


def fake_task(output_type: str, **attributes: Any) -> Any:
    """The parts of an lm-eval task that output types use, with one document."""
    parts = dict(
        OUTPUT_TYPE=output_type,
        task_name="sums",
        multiple_input=False,
        instances=[SimpleNamespace(doc_id=0, doc=DOC)],
        doc_to_text=lambda doc: doc["question"],
        doc_to_target=lambda doc: doc["label"],
        doc_to_choice=lambda doc: doc["choices"],
        higher_is_better=lambda: {"exact_match": True, "edits": False},
    )
    return SimpleNamespace(**parts | attributes)


def test_every_output_type_of_lm_eval_is_known() -> None:
    from lm_eval.api.task import ALL_OUTPUT_TYPES

    assert set(OUTPUT_TYPES) == set(ALL_OUTPUT_TYPES)


def test_an_unknown_output_type_is_refused() -> None:
    with pytest.raises(BadInput, match="task sums has the unknown output type 'generate_till'") as raised:
        output_type_of(fake_task("generate_till"))
    assert "did you mean generate_until" in raised.value.message
    assert raised.value.fix == f"known output types: {', '.join(OUTPUT_TYPES)}"


def test_a_task_of_an_unknown_output_type_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.api.task.ALL_OUTPUT_TYPES", [*OUTPUT_TYPES, "guess"])
    (tmp_path / "rows.jsonl").write_text(json.dumps(DOC) + "\n")
    (tmp_path / "odd.yaml").write_text(
        f"task: odd\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        'test_split: test\noutput_type: guess\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{label}}"\n'
        "metric_list: [{metric: acc}]\n"
    )
    with pytest.raises(BadInput, match="task odd has the unknown output type 'guess'"):
        TaskSet.load(["odd"], [tmp_path])


@pytest.mark.parametrize(
    ("name", "metric", "chance"),
    [
        ("loglikelihood", "acc", None),
        ("loglikelihood_rolling", "bits_per_byte", 8.0),
        ("loglikelihood_rolling", "word_perplexity", None),
        ("multiple_choice", "acc", 0.25),
        ("multiple_choice", "acc_norm", 0.25),
        ("multiple_choice", "brier_score", None),
        ("generate_until", "exact_match", 0.0),
        ("generate_until", "edits", None),
        ("generate_until", "bits_per_byte", 8.0),
    ],
)
def test_the_chance_level(name: str, metric: str, chance: float | None) -> None:
    assert OUTPUT_TYPES[name].chance(fake_task(name), metric) == chance


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("loglikelihood", {"target": "2"}),
        ("loglikelihood_rolling", {}),
        (
            "multiple_choice",
            {
                "target": "2",
                "response": "3",
                "choice_logprobs": [-2.0, -1.0, -3.0, -4.0],
                "choice_lengths": [1, 1, 1, 1],
            },
        ),
        ("generate_until", {"target": "2", "response": "two"}),
    ],
)
def test_the_answer_columns(name: str, columns: dict[str, Any]) -> None:
    sample = {
        "doc": DOC,
        "target": 0 if name == "multiple_choice" else "2",
        "resps": [["two"]],
        "filtered_resps": [(-2.0, False), (-1.0, True), (-3.0, False), (-4.0, False)],
    }
    assert OUTPUT_TYPES[name].answer_columns(fake_task(name), "acc", sample) == columns


def test_only_this_module_looks_at_output_types() -> None:
    """So that a new output type of lm-eval is one new class."""
    users = [path.name for path in (ROOT / "evals").rglob("*.py") if "OUTPUT_TYPE ==" in path.read_text()]
    readers = [path.name for path in (ROOT / "evals").rglob("*.py") if ".OUTPUT_TYPE" in path.read_text()]
    assert users == []
    assert readers == ["output_types.py"]
