"""`--metric` and `--filter`: which of a task's figures is recorded, and that it is not compared with another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.evals.scores.comparability import describe_differences
from limbeck.evals.scores.harness import Scores, score_model
from limbeck.evals.tasks.metrics import MetricChoice
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, Scorecard
from tests.conftest import Result, make_model
from tests.evals.task_files import write_task

MEANS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
FILTERS = [
    {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
    {"name": "last", "filter": [{"function": "regex", "regex_pattern": "(.)$"}, {"function": "take_first"}]},
]
WRITTEN: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "filter_list": FILTERS,
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(autouse=True)
def home(limbeck_home: Path) -> Path:
    return limbeck_home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks `one` and `two` of choices of unequal length, their group `both`, and `written` with two filters."""
    for name, count in (("one", 30), ("two", 20)):
        rows = [
            {"question": f"{n} or {name}?", "choices": [" a", " a much longer choice than that"], "label": n % 2}
            for n in range(count)
        ]
        write_task(tmp_path, name, rows, metric_list=MEANS)
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": MEANS_OF_GROUP}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    write_task(tmp_path, "written", [{"question": f"{n}?", "answer": f"{n}"} for n in range(4)], **WRITTEN)
    return tmp_path


MEANS_OF_GROUP = [{"metric": "acc"}, {"metric": "acc_norm", "weight_by_size": False}]


def scored(model: Path, folder: Path, names: list[str], **choice: dict[str, str]) -> Scores:
    return score_model(resolve_model(str(model)), TaskSet.load(names, [folder], choice=MetricChoice(**choice)))


def test_the_metric_that_was_asked_for_is_lm_evals(folder: Path, tiny_llama: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32", batch_size=8),
        tasks=["both", "written"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert theirs is not None
    usual = scored(tiny_llama, folder, ["both", "written"])
    other = scored(tiny_llama, folder, ["both", "written"], metrics={"both": "acc_norm"}, filters={"written": "last"})
    assert usual.tasks["one"].value != other.tasks["one"].value  # the model has no preference but for length
    for scores, metric, found_by in ((usual, "acc,none", "first"), (other, "acc_norm,none", "last")):
        for task in ("one", "two", "both"):
            assert scores.tasks[task].value == pytest.approx(theirs["results"][task][metric])
            assert f"{scores.tasks[task].metric},{scores.tasks[task].filter}" == metric
        written = scores.tasks["written"]
        assert (written.metric, written.filter) == ("exact_match", found_by)
        assert written.value == pytest.approx(theirs["results"]["written"][f"exact_match,{found_by}"])
    table = other.documents.to_pandas()
    table = table[table["task"].isin(["one", "two"])]
    assert np.average(table["value"], weights=table["weight"]) == pytest.approx(other.tasks["both"].value)


def test_the_choice_is_part_of_the_tasks_hash_unless_it_is_the_tasks_own(folder: Path) -> None:
    def hashes(**choice: dict[str, str]) -> list[str]:
        return [*TaskSet.load(["one", "written"], [folder], choice=MetricChoice(**choice)).task_hashes.values()]

    usual = hashes()
    assert hashes(metrics={"one": "acc"}, filters={"written": "first"}) == usual
    assert [a == b for a, b in zip(hashes(metrics={"one": "acc_norm"}), usual, strict=True)] == [False, True]
    assert [a == b for a, b in zip(hashes(filters={"written": "last"}), usual, strict=True)] == [True, False]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"metrics": {"three": "acc"}}, "--metric names the task 'three'"),
        ({"metrics": {"one": "f1"}}, "no mean over documents called 'f1'; it has acc, acc_norm"),
        ({"filters": {"written": "middle"}}, "no filter 'middle'; it has first, last"),
        ({"metrics": {"one": "acc_norm"}}, "group both has one value, but one is scored by acc_norm"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(folder: Path, choice: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        TaskSet.load(["both", "written"], [folder], choice=MetricChoice(**choice))


def test_scores_by_different_metrics_are_not_compared(
    folder: Path, store: Store, tiny_llama: Path, tokenizer_folder: Path, limbeck: Callable[..., Result]
) -> None:
    store.register(NewVersion(name="m", kind="teacher"), tiny_llama)
    store.register(NewVersion(name="m", kind="student"), make_model(folder / "s", tokenizer_folder, "llama", seed=5))
    options = ["--tasks", "one", "--include-path", folder, "--no-cost", "--format", "json"]
    teacher = json.loads(limbeck("eval", "m/1", *options, "--metric", "one=acc").out)[0]
    student = json.loads(limbeck("eval", "m/2", *options, "--metric", "one=acc_norm").out)[0]
    assert [card["tasks"]["one"]["metric"] for card in (teacher, student)] == ["acc", "acc_norm"]
    cards = [Scorecard.model_validate(card) for card in (student, teacher)]
    assert describe_differences(cards[:1], cards[1:]) == ["acc_norm of one, not acc"]
    refused = limbeck("compare", "m/2", "m/1")
    assert refused.code == 2
    assert "m/2 was scored on one (acc_norm); m/1 was scored on one (acc)" in refused.err
    limbeck("eval", "m/1", *options, "--metric", "one=acc_norm")
    assert json.loads(limbeck("compare", "m/2", "m/1", "--format", "json").out)["tasks"][0]["metric"] == "acc_norm"
    for wrong in ("acc_norm", "one=", "=acc"):
        assert "is not TASK=NAME" in limbeck("eval", "m/1", *options, "--metric", wrong).err
