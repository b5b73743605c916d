"""Overlap of training text with tasks: compared with brute force, for each output type, and in `limbeck eval`."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.evals.scores.scorecard import EvalOptions, evaluate
from limbeck.evals.tasks.contamination import measure_contamination, overlaps
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import load_registered_version
from limbeck.registry.core import jsonl
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, Overlap
from tests.conftest import Result

DIGEST = "d" * 64


def brute_force(documents: list[list[str]], training: list[list[str]]) -> int:
    """Counts documents with a run of 13 words, or all of fewer words, in a training text; compares all runs."""
    contaminated = 0
    for words in documents:
        n = min(13, len(words))
        runs = {tuple(words[start : start + n]) for start in range(len(words) - n + 1)} if n else set()
        contaminated += any(
            tuple(text[start : start + n]) in runs for text in training for start in range(len(text) - n + 1) if n
        )
    return contaminated


def test_overlaps_equal_those_by_brute_force() -> None:
    rng = random.Random(0)
    names = [f"w{number}" for number in range(12)]
    training = [rng.choices(names, k=rng.randint(0, 90)) for _ in range(60)]
    documents = [rng.choices([*names, "unknown"], k=rng.randint(0, 25)) for _ in range(100)]
    for number in range(60):
        text = rng.choice([text for text in training if len(text) > 20])
        start = rng.randrange(len(text) - 16)
        part = text[start : start + rng.randint(1, 16)]
        documents.append(part if number % 2 else ["before", *part, "after"])
    expected = brute_force(documents, training)
    assert 30 < expected < 120
    found = overlaps({"t": [" ".join(words) for words in documents]}, (" ".join(words) for words in training))
    assert found == {"t": Overlap(documents=160, contaminated=expected)}


def test_case_punctuation_and_shared_instructions_do_not_count() -> None:
    line = "The quick brown fox jumps over the lazy dog, and then it sleeps until morning."
    one = {"t": [line]}
    assert overlaps(one, [f"so: {line.upper().replace(',', ' --')}!"])["t"].contaminated == 1
    assert overlaps(one, [line.replace("fox", "cat").replace("sleeps", "rests")])["t"].contaminated == 0
    assert overlaps(one, line.split())["t"].contaminated == 0  # not across documents
    # An instruction that more than ten documents share is no evidence.
    for count, contaminated in ((10, 10), (11, 1)):
        documents = [f"{line} number {number}" for number in range(count - 1)] + [f"{line} copied word for word"]
        found = overlaps({"t": documents}, [f"{line} copied word for word"] + [line] * (count == 10))
        assert found["t"].contaminated == contaminated
    assert overlaps({"t": ["", "..."]}, [line])["t"] == Overlap(documents=2, contaminated=0)
    assert overlaps({}, [line]) == {}


def test_scripts_without_spaces_are_split_into_characters() -> None:
    text = "\u732b\u306f\u7a93\u306e\u305d\u3070\u3067\u9759\u304b\u306b\u7720\u3063\u3066\u3044\u308b\u3002"
    assert overlaps({"t": [text]}, [f"\u6628\u65e5{text}\u3068"])["t"].contaminated == 1
    assert overlaps({"t": [text]}, [text[:8] + "\u72ac" + text[9:]])["t"].contaminated == 0


@pytest.fixture
def training_text(limbeck_home: Path) -> Callable[..., Path]:
    """A function that stores a training text under a digest, as a recipe does."""

    def write(*texts: str, digest: str = DIGEST) -> Path:
        folder = limbeck_home / "data" / "text"
        folder.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps({"path": str(number), "text": text}) + "\n" for number, text in enumerate(texts))
        (folder / "train.jsonl").write_text("".join(rows))
        (folder / "corpus.json").write_text(json.dumps({"digest": digest}))
        return folder

    return write


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., TaskSet]:
    """A function that loads a task over rows of {"q", "a", "wrong"} from lm-eval's YAML."""

    def load_task(yaml: str, rows: list[dict[str, object]], **settings: int) -> TaskSet:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "t.yaml").write_text(
            f"task: t\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
            f"test_split: test\n{yaml}\n"
        )
        return TaskSet.load(["t"], [folder], **settings)

    return load_task


WORDS = [f"word{number}" for number in range(1, 14)]
ROWS: list[dict[str, object]] = [
    {"q": " ".join(WORDS[:8]), "a": " ".join(WORDS[8:]), "wrong": "another end of all that"},
    {"q": "a question that is nowhere", "a": "an answer", "wrong": "no answer"},
]
KINDS = {
    "loglikelihood_rolling": 'doc_to_text: ""\ndoc_to_target: "{{q}} {{a}}"\nmetric_list: [{metric: bits_per_byte}]',
    "multiple_choice": 'doc_to_text: "{{q}}"\ndoc_to_choice: "{{[wrong, a]}}"\ndoc_to_target: 1\n'
    "metric_list: [{metric: acc}]",
    "loglikelihood": 'doc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\nmetric_list: [{metric: acc}]',
    "generate_until": 'doc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\nmetric_list: [{metric: exact_match}]',
    # Each choice gives a prompt of its own, as in Winogrande.
    "multiple_choice of prompts": 'doc_to_text: "{{1}}"\ndoc_to_choice: "{{[wrong, q]}}"\ndoc_to_target: "{{a}}"\n'
    "metric_list: [{metric: acc}]",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_with_the_right_answer_is_searched_for(
    training_text: Callable[..., Path], load: Callable[..., TaskSet], kind: str
) -> None:
    tasks = load(f"output_type: {kind.split()[0]}\n{KINDS[kind]}", ROWS)
    training_text("as before: " + " ".join(WORDS) + " and so on", "another end of all that")
    found = measure_contamination(tasks, DIGEST)
    assert found is not None
    assert found.tasks == {"t": Overlap(documents=2, contaminated=1)}
    training_text("as before: " + " ".join(WORDS[:12]), digest="e" * 64)
    again = measure_contamination(tasks, "e" * 64)
    assert again is not None
    assert again.tasks["t"].contaminated == 0


def test_only_the_documents_that_are_scored_count(
    training_text: Callable[..., Path], load: Callable[..., TaskSet]
) -> None:
    training_text(" ".join(WORDS))
    yaml = f"output_type: loglikelihood\n{KINDS['loglikelihood']}"
    for settings, documents, contaminated in (({"limit": 1}, 1, 1), ({"samples": {"t": [1]}}, 1, 0)):
        found = measure_contamination(load(yaml, ROWS, **settings), DIGEST)
        assert found is not None
        assert found.tasks["t"] == Overlap(documents=documents, contaminated=contaminated)


def test_a_training_text_that_is_missing_or_damaged(
    training_text: Callable[..., Path], load: Callable[..., TaskSet], limbeck_home: Path
) -> None:
    tasks = load(f"output_type: loglikelihood\n{KINDS['loglikelihood']}", ROWS)
    folder = training_text("some text")
    assert measure_contamination(tasks, "f" * 64) is None
    (folder / "train.jsonl").write_text("not JSON\n")
    with pytest.raises(BadInput, match=r"train.jsonl, line 1"):
        measure_contamination(tasks, DIGEST)
    training_text("some text")
    found = measure_contamination(tasks, DIGEST)
    shutil.rmtree(folder)
    assert jsonl.find_training_text(DIGEST) is None
    assert found is not None
    assert measure_contamination(tasks, DIGEST) is None


def test_eval_records_the_overlap_in_the_scorecard(
    training_text: Callable[..., Path],
    load: Callable[..., TaskSet],
    store: Store,
    tiny_llama: Path,
    limbeck: Callable[..., Result],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = load(f"output_type: loglikelihood\n{KINDS['loglikelihood']}", ROWS)
    version = store.register(NewVersion(name="m", kind="student", data_digest=DIGEST), tiny_llama)
    model = load_registered_version(version, store)
    (card,) = evaluate([model], tasks, store, options=EvalOptions(cost=False))
    assert card.contamination is None
    assert "not on this machine" in capsys.readouterr().err
    folder = training_text(" ".join(WORDS))
    (card,) = evaluate([model], tasks, store, options=EvalOptions(cost=False))
    assert card.contamination is not None
    assert card.contamination.tasks == {"t": Overlap(documents=2, contaminated=1)}
    assert "1 of 2 of t" in capsys.readouterr().err
    assert store.findings.scorecards(version)[-1] == card
    assert "in training text" in limbeck("models", "show", "m/1").out
    shutil.rmtree(folder)  # the recorded overlap stays
    (again,) = evaluate([model], tasks, store, options=EvalOptions(cost=False))
    assert again == card
    runs = store.client.search_runs(
        [store.client.get_experiment_by_name("limbeck").experiment_id], "metrics.`contamination.t` = 0.5"
    )
    assert len(runs) == 1
