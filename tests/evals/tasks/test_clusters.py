"""Documents that belong together: repeated, nearly repeated, of one context, or by the column that the task names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.evals.scores.harness import Scores, score_model
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.core.errors import BadInput
from tests.conftest import Result
from tests.evals.task_files import questions, write_task

Documents = list[dict[str, Any]]
STORY = "The river rose in spring, and the old mill at its bank turned day and night until the last sack was ground. "

TRAVEL = "A train leaves the station at noon and travels at a steady speed of sixty miles an hour until it stops."


@pytest.fixture
def score(tiny_llama: Path, tmp_path: Path, limbeck_home: Path) -> Callable[..., Scores]:
    def run(documents: Documents, **config: Any) -> Scores:
        write_task(tmp_path, "sums", documents, **config)
        return score_model(resolve_model(str(tiny_llama)), TaskSet.load(["sums"], [tmp_path]))

    return run


def clusters(scores: Scores) -> list[int]:
    """The size of each cluster, largest first."""
    labels = scores.documents["cluster"].to_pylist()
    return sorted((labels.count(label) for label in set(labels)), reverse=True)


def test_repeated_documents_have_the_error_of_one(score: Callable[..., Scores]) -> None:
    once = score(questions(12)).tasks["sums"]
    again = score(questions(12) * 20).tasks["sums"]
    assert (once.clusters, once.repeats) == (12, 0)
    assert (again.documents, again.clusters, again.repeats) == (240, 12, 228)
    assert again.value == once.value
    assert again.stderr == pytest.approx(once.stderr)


def test_case_punctuation_and_a_few_words_make_no_other_document(score: Callable[..., Scores]) -> None:
    text = (
        "A farmer has twelve hens and each of them lays one egg on every day of the week but Sunday. He keeps two eggs "
        "a day for his breakfast and sells the others at the market for a quarter of a dollar. How much does he earn?"
    )
    other = (
        "A train leaves the station at noon and travels at a steady speed of sixty miles an hour until it stops. When?"
    )
    texts = [text, text.upper() + "!!", text.replace("farmer", "baker"), other, other.replace("?", ".")]
    documents = [{"question": each, "choices": [" 1", " 2"], "label": 1} for each in [*texts, "noon", "one"]]
    found = score(documents)
    assert clusters(found) == [3, 2, 1, 1]
    assert found.tasks["sums"].repeats == 3


def test_documents_about_one_passage_belong_together(score: Callable[..., Scores]) -> None:
    """The instruction that all share is no passage."""
    passages = [STORY * 3, f"{TRAVEL} " * 3]
    documents = [
        {"question": f"{n}?", "choices": [" a", " b"], "label": 0, "passage": passages[n % 2], "task": STORY * 4}
        for n in range(9)
    ]
    documents[8]["passage"] = "none"
    found = score(documents, doc_to_text="{{passage}} {{question}}")
    # The questions of one passage also repeat each other: only their number differs.
    assert clusters(found) == [4, 4, 1]


def test_a_task_names_its_clusters(score: Callable[..., Scores]) -> None:
    documents = [each | {"patient": n // 3} for n, each in enumerate(questions(12))]
    assert clusters(score(documents, metadata={"cluster": "patient"})) == [3] * 4
    with pytest.raises(BadInput, match="document 0: its metadata clusters by 'person', which it has not"):
        score(documents, metadata={"cluster": "person"})


def test_files_are_clusters(score: Callable[..., Scores]) -> None:
    documents = [each | {"path": f"{n % 2}.py"} for n, each in enumerate(questions(12))]
    assert set(score(documents).documents["cluster"].to_pylist()) == {"0.py", "1.py"}


def test_eval_reports_repeats(
    limbeck: Callable[..., Result], tiny_llama: Path, limbeck_home: Path, tmp_path: Path
) -> None:
    write_task(tmp_path, "sums", questions(5) * 3)
    done = limbeck("eval", tiny_llama, "--tasks", "sums", "--include-path", tmp_path, "--no-cost")
    assert "sums: 10 of 15 documents repeat others, so the error is that of 5 independent ones" in done.err
