"""Overlap of training text with tasks: against brute force, for each kind of task, and as `limbeck eval` keeps it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.evals.scores.scorecard import evaluate
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
    """Documents with a run of 13 words, or of all of theirs, in a training text: all runs compared with all."""
    dirty = 0
    for words in documents:
        n = min(13, len(words))
        runs = {tuple(words[at : at + n]) for at in range(len(words) - n + 1)} if n else set()
        dirty += any(tuple(text[at : at + n]) in runs for text in training for at in range(len(text) - n + 1) if n)
    return dirty


def test_as_by_brute_force() -> None:
    chance = random.Random(0)
    names = [f"w{number}" for number in range(12)]
    training = [chance.choices(names, k=chance.randint(0, 90)) for _ in range(60)]
    documents = [chance.choices([*names, "unknown"], k=chance.randint(0, 25)) for _ in range(100)]
    for number in range(60):
        text = chance.choice([text for text in training if len(text) > 20])
        at = chance.randrange(len(text) - 16)
        part = text[at : at + chance.randint(1, 16)]
        documents.append(part if number % 2 else ["before", *part, "after"])
    expected = brute_force(documents, training)
    assert 30 < expected < 120
    found = overlaps({"t": [" ".join(words) for words in documents]}, (" ".join(words) for words in training))
    assert found == {"t": Overlap(documents=160, contaminated=expected)}


def test_what_does_not_count() -> None:
    line = "The quick brown fox jumps over the lazy dog, and then it sleeps until morning."
    one = {"t": [line]}
    assert overlaps(one, [f"so: {line.upper().replace(',', ' --')}!"])["t"].contaminated == 1
    assert overlaps(one, [line.replace("fox", "cat").replace("sleeps", "rests")])["t"].contaminated == 0
    assert overlaps(one, line.split())["t"].contaminated == 0  # not across documents
    # An instruction that more than ten documents share says nothing of them.
    for count, dirty in ((10, 10), (11, 1)):
        documents = [f"{line} number {number}" for number in range(count - 1)] + [f"{line} copied word for word"]
        found = overlaps({"t": documents}, [f"{line} copied word for word"] + [line] * (count == 10))
        assert found["t"].contaminated == dirty
    assert overlaps({"t": ["", "..."]}, [line])["t"] == Overlap(documents=2, contaminated=0)
    assert overlaps({}, [line]) == {}


def test_scripts_without_blanks_go_by_characters() -> None:
    text = "\u732b\u306f\u7a93\u306e\u305d\u3070\u3067\u9759\u304b\u306b\u7720\u3063\u3066\u3044\u308b\u3002"
    assert overlaps({"t": [text]}, [f"\u6628\u65e5{text}\u3068"])["t"].contaminated == 1
    assert overlaps({"t": [text]}, [text[:8] + "\u72ac" + text[9:]])["t"].contaminated == 0


@pytest.fixture
def training_text(limbeck_home: Path) -> Callable[..., Path]:
    """Lays by a training text of some digest, as a recipe does."""

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
    """A task over rows of {"q", "a", "wrong"} by lm-eval's YAML."""

    def of(yaml: str, rows: list[dict[str, object]], **settings: int) -> TaskSet:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "t.yaml").write_text(
            f"task: t\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
            f"test_split: test\n{yaml}\n"
        )
        return TaskSet.load(["t"], [folder], **settings)

    return of


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
    # Each choice makes a prompt of its own, as in Winogrande.
    "multiple_choice of prompts": 'doc_to_text: "{{1}}"\ndoc_to_choice: "{{[wrong, q]}}"\ndoc_to_target: "{{a}}"\n'
    "metric_list: [{metric: acc}]",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_with_the_right_answer_is_looked_for(
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


def test_only_the_documents_that_are_asked_count(
    training_text: Callable[..., Path], load: Callable[..., TaskSet]
) -> None:
    training_text(" ".join(WORDS))
    yaml = f"output_type: loglikelihood\n{KINDS['loglikelihood']}"
    for settings, documents, dirty in (({"limit": 1}, 1, 1), ({"samples": {"t": [1]}}, 1, 0)):
        found = measure_contamination(load(yaml, ROWS, **settings), DIGEST)
        assert found is not None
        assert found.tasks["t"] == Overlap(documents=documents, contaminated=dirty)


def test_text_that_is_not_at_hand_or_no_text(
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


def test_eval_keeps_the_overlap_with_the_scorecard(
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
    (card,) = evaluate([model], tasks, store, cost=False)
    assert card.contamination is None
    assert "not at hand" in capsys.readouterr().err
    folder = training_text(" ".join(WORDS))
    (card,) = evaluate([model], tasks, store, cost=False)
    assert card.contamination is not None
    assert card.contamination.tasks == {"t": Overlap(documents=2, contaminated=1)}
    assert "1 of 2 of t" in capsys.readouterr().err
    assert store.findings.scorecards(version)[-1] == card
    assert "in training text" in limbeck("models", "show", "m/1").out
    shutil.rmtree(folder)  # what is known stays known
    (again,) = evaluate([model], tasks, store, cost=False)
    assert again == card
    runs = store.client.search_runs(
        [store.client.get_experiment_by_name("limbeck").experiment_id], "metrics.`contamination.t` = 0.5"
    )
    assert len(runs) == 1
