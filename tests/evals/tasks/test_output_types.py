"""Output types: every one of lm-eval's has its class, an unknown one is refused, and no other module compares them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lm_eval.api.filter import FilterEnsemble

from limbeck.evals.tasks.chance import best_constant_answer, free_bits_per_byte, word_frequency_bits
from limbeck.evals.tasks.metrics import Metric
from limbeck.evals.tasks.output_types import OUTPUT_TYPES, output_type_of
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.core.errors import BadInput
from tests import ROOT
from tests.evals.task_files import write_task

DOC = {"question": "1 + 1 =", "choices": ["2", "3", "4", "5"], "label": 0}


def fake_task(output_type: str, **attributes: Any) -> Any:
    """The parts of an lm-eval task that output types use, with one document."""
    parts = dict(
        OUTPUT_TYPE=output_type,
        task_name="sums",
        multiple_input=False,
        config=SimpleNamespace(metadata=None),
        _filters=[FilterEnsemble("none", [])],
        process_results=lambda doc, results: {"exact_match": results[0] == [str(doc["label"])]},
        instances=[SimpleNamespace(doc_id=0, doc=DOC)],
        doc_to_text=lambda doc: doc["question"],
        doc_to_target=lambda doc: doc["label"],
        doc_to_choice=lambda doc: doc["choices"],
        higher_is_better=lambda: {"exact_match": True, "edits": False, "bits_per_byte": False},
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
        ("loglikelihood_rolling", "bits_per_byte", 8.0),  # one byte of text: no code is shorter
        ("loglikelihood_rolling", "word_perplexity", None),
        ("multiple_choice", "acc", 0.25),
        ("multiple_choice", "acc_norm", 0.25),
        ("multiple_choice", "brier_score", None),
        ("generate_until", "exact_match", 1.0),
        ("generate_until", "edits", None),
        ("generate_until", "bits_per_byte", 8.0),
    ],
)
def test_the_chance_level(name: str, metric: str, chance: float | None) -> None:
    assert OUTPUT_TYPES[name].chance(fake_task(name), Metric(metric, "none")).value == chance


@pytest.mark.parametrize(("name", "metric", "said", "chance"), [
    ("multiple_choice", "acc", 0.4, 0.4), ("multiple_choice", "acc", 0.1, 0.25), ("loglikelihood", "acc", 0.1, 0.1),
    ("loglikelihood_rolling", "bits_per_byte", 9.0, 8.0), ("loglikelihood_rolling", "bits_per_byte", 1.5, 1.5),
])  # fmt: skip
def test_metadata_only_raise_the_chance_level(name: str, metric: str, said: float, chance: float) -> None:
    task = fake_task(name, config=SimpleNamespace(metadata={"chance": said}))
    assert OUTPUT_TYPES[name].chance(task, Metric(metric, "none")).value == chance


def test_a_generative_task_counts_from_its_best_constant_answer(tmp_path: Path) -> None:
    """Letters of choices, in the form that benchmarks have them: read by a regex, three of five are (B)."""
    targets = "BABCB" * 20
    documents = [
        {"question": f"{n}?", "answer": f"(A) is wrong. The answer is ({target})"} for n, target in enumerate(targets)
    ]
    write_task(
        tmp_path, "letters", documents, output_type="generate_until", doc_to_choice=None, doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"]},
        filter_list=[{"name": "letter", "filter": [
            {"function": "regex", "regex_pattern": "answer is \\((.)\\)"}, {"function": "take_first"}]}],
        process_docs=None, metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
                      "regexes_to_ignore": [".*answer is \\(", "\\)"]}],
    )  # fmt: skip
    [task] = TaskSet.load(["letters"], [tmp_path]).tasks.values()
    found = best_constant_answer(task, Metric("exact_match", "letter"), documents)
    assert found.value == pytest.approx(0.6)
    assert found.source is not None
    assert "B" in found.source


def test_a_text_counts_from_what_needs_no_model() -> None:
    text = "the cat sat on the mat and the dog sat on the log\n" * 400
    assert free_bits_per_byte([text]).value < 0.1
    random = "".join(map(chr, np.random.default_rng(0).integers(33, 127, 20_000)))
    assert free_bits_per_byte([random]).value == pytest.approx(np.log2(94), rel=0.02)
    words = np.array([f"w{n}" for n in range(50)])[np.random.default_rng(0).integers(0, 50, 4000)]
    text = " ".join(words)
    # Each word costs log2(50) bits, and the space after it nearly nothing more than its share of one bit.
    by_frequency = word_frequency_bits(text.encode())
    assert np.log2(50) < by_frequency / 4000 < np.log2(50) + 2.3
    assert free_bits_per_byte([]).value == 8.0


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
