"""Scores are lm-eval's own, document by document, with what a comparison needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.evals.scores.harness import Scores, score_model
from limbeck.evals.tasks.documents import DOCUMENT_SCHEMA
from limbeck.evals.tasks.make_tasks import make_tasks
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.core.errors import BadInput
from tests import ROOT
from tests.conftest import make_model

NAMES = ["std_bits_per_byte", "std_minimal_pairs", "std_next_line"]
RULES = ("swapped_bracket", "misplaced_keyword", "undefined_name", "wrong_indentation")
SHARED = ROOT.parent / "shared/data"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A state folder for all of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Path:
    """The three kinds of tasks, 8 documents each."""
    folder = tmp_path_factory.mktemp("tasks")
    make_tasks(sources, folder, "std", documents=8)
    return folder


@pytest.fixture(scope="module")
def tasks(folder: Path) -> TaskSet:
    return TaskSet.load(NAMES, [folder])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """With room for whole snippets."""
    return make_model(tmp_path_factory.mktemp("llama"), tokenizer_folder, "llama", max_position_embeddings=300)


@pytest.fixture(scope="module")
def scores(tasks: TaskSet, llama: Path) -> Scores:
    return score_model(resolve_model(str(llama)), tasks)


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], **config: Any) -> None:
    """A YAML task (JSON is YAML) of two choices, unless `config` says otherwise."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    choice = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    metrics = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    task |= {"test_split": "test", "output_type": "multiple_choice", **choice, **metrics, **config}
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def questions(count: int) -> list[dict[str, Any]]:
    return [{"question": f"{n} + 1 =", "choices": [f" {n}", f" {n + 1}"], "label": 1} for n in range(count)]


def test_values_are_those_that_lm_eval_gives_hflm(folder: Path, scores: Scores, llama: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(llama), device="cpu", dtype="float32", batch_size=8),
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results is not None
    for name, result in scores.tasks.items():
        assert result.value == pytest.approx(results["results"][name][f"{result.metric},none"], abs=1e-5)
    ours = {(row["task"], row["doc_id"]): row for row in scores.documents.to_pylist()}
    theirs = {(name, row["doc_id"]): row for name, rows in results["samples"].items() for row in rows}
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert (row["doc_hash"], row["prompt_hash"]) == (theirs[key]["doc_hash"], theirs[key]["prompt_hash"])


def test_a_metric_is_the_weighted_mean_of_its_documents(scores: Scores) -> None:
    assert scores.documents.schema == DOCUMENT_SCHEMA
    table = scores.documents.to_pandas()
    for name, result in scores.tasks.items():
        rows = table[[task in (name, *members(scores, name)) for task in table["task"]]]
        assert np.average(rows["value"], weights=rows["weight"]) == pytest.approx(result.value, abs=1e-9)
        assert len(rows) == result.documents
        assert set(rows["metric"]) == {result.metric}


def members(scores: Scores, group: str) -> list[str]:
    return [name for name, result in scores.tasks.items() if result.group == group]


def test_groups_chance_and_clusters_are_told(scores: Scores, sources: Path) -> None:
    assert set(members(scores, "std_minimal_pairs")) == {f"std_minimal_pairs_{rule}" for rule in RULES}
    assert [name for name, result in scores.tasks.items() if result.group is None] == NAMES
    assert {name: scores.tasks[name].chance for name in NAMES} == {
        "std_minimal_pairs": 0.5,
        "std_bits_per_byte": 8.0,
        "std_next_line": 0.25,
    }
    assert not scores.tasks["std_bits_per_byte"].higher_is_better
    assert scores.tasks["std_next_line"].higher_is_better
    paths = {json.loads(line)["path"] for line in sources.read_text().splitlines()}
    assert set(scores.documents["cluster"].to_pylist()) <= paths
    assert all(result.stderr is not None and result.stderr >= 0 for result in scores.tasks.values())


def test_onnx_scores_as_pytorch_does(tasks: TaskSet, scores: Scores, llama: Path, onnx: Any) -> None:
    seen: list[tuple[int, int]] = []
    other = score_model(
        resolve_model(str(onnx(llama))), tasks, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (tasks.requests, tasks.requests)
    assert other.prompts_digest == scores.prompts_digest
    ours, theirs = other.documents.to_pandas(), scores.documents.to_pandas()
    numbers = ["value", "choice_logprobs"]
    assert ours.drop(columns=numbers).equals(theirs.drop(columns=numbers))
    assert np.allclose(ours["value"], theirs["value"], atol=1e-4)
    for mine, other in zip(ours["choice_logprobs"].dropna(), theirs["choice_logprobs"].dropna(), strict=True):
        assert np.allclose(mine, other, atol=1e-4)


def test_the_digest_is_of_documents_and_settings_not_of_places(folder: Path, tmp_path: Path, sources: Path) -> None:
    def digest(at: Path, **settings: Any) -> str:
        return TaskSet.load(["std_bits_per_byte", "std_next_line"], [at], **settings).digest

    first = digest(folder)
    make_tasks(sources, tmp_path / "again", "std", documents=8)
    make_tasks(sources, tmp_path / "more", "std", documents=9)
    assert digest(tmp_path / "again") == first
    assert len({first, digest(tmp_path / "more"), digest(folder, limit=4)}) == 3


def test_a_limit_takes_the_first_documents(folder: Path, tiny_llama: Path) -> None:
    few = score_model(resolve_model(str(tiny_llama)), TaskSet.load(["std_bits_per_byte"], [folder], limit=3))
    assert few.documents["doc_id"].to_pylist() == [0, 1, 2]


def test_examples_are_put_before_a_question(tmp_path: Path, tiny_llama: Path) -> None:
    write_task(tmp_path, "sums", questions(6))
    write_task(tmp_path, "fixed", questions(6), num_fewshot=0)
    plain, shown = (TaskSet.load(["sums", "fixed"], [tmp_path], num_fewshot=count) for count in (None, 2))
    assert shown.digest != plain.digest
    assert shown.task_hashes["fixed"] == plain.task_hashes["fixed"]
    model = resolve_model(str(tiny_llama))
    twice = [score_model(model, shown) for _ in range(2)]
    assert twice[0].prompts_digest == twice[1].prompts_digest != score_model(model, plain).prompts_digest


def test_a_group_of_unequal_tasks_is_the_mean_of_their_means(tmp_path: Path, tiny_llama: Path) -> None:
    write_task(tmp_path, "one", questions(3))
    wrong_way = [row | {"label": 0} for row in questions(13)[3:]]
    write_task(tmp_path, "two", wrong_way)
    metrics = [{"metric": "acc", "weight_by_size": False}]
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": metrics}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    scores = score_model(resolve_model(str(tiny_llama)), TaskSet.load(["both"], [tmp_path]))
    means = [scores.tasks[name].value for name in ("one", "two")]
    assert means[0] != means[1]
    assert scores.tasks["both"].value == pytest.approx(np.mean(means))
    table = scores.documents.to_pandas()
    assert np.average(table["value"], weights=table["weight"]) == pytest.approx(np.mean(means))
    assert set(table[table["task"] == "one"]["cluster"]) == {"one:0", "one:1", "one:2"}


def test_generated_answers_may_all_be_wrong(tmp_path: Path, tiny_llama: Path, onnx_llama: Path) -> None:
    write_task(
        tmp_path,
        "answers",
        [{"question": f"What is {n} + {n}?", "answer": f"The sum. #### {2 * n}"} for n in range(4)],
        output_type="generate_until",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice=None,
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["Question:"], "do_sample": False, "max_gen_toks": 12},
        filter_list=[
            {"name": "strict", "filter": [{"function": "regex", "regex_pattern": "#### (\\d+)"},
                                          {"function": "take_first"}]},
            {"name": "loose", "filter": [{"function": "take_first"}]},
        ],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    tasks = TaskSet.load(["answers"], [tmp_path])
    for model in (tiny_llama, onnx_llama):
        scores = score_model(resolve_model(str(model)), tasks)
        result = scores.tasks["answers"]
        assert (result.value, result.chance, result.documents) == (0.0, 0.0, 4)


def rows_of(folder: Path, name: str, model: Path) -> list[dict[str, Any]]:
    return score_model(resolve_model(str(model)), TaskSet.load([name], [folder])).documents.to_pylist()


def test_choices_and_what_was_taken_are_kept(tmp_path: Path, tiny_llama: Path) -> None:
    prompt = {"question": "x" * 400 + " 1 + 1 =", "choices": [" 2", " the lazy dog", " é"], "label": 2}
    norm = [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
    both = [{"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True}]
    for name, metrics in {"plain": {}, "norm": {"metric_list": norm}, "bytes": {"metric_list": both}}.items():
        write_task(tmp_path, name, [prompt | {"label": label} for label in range(3)], target_delimiter="", **metrics)
        sizes = {"plain": [1, 1, 1], "norm": [2, 13, 2], "bytes": [2, 13, 3]}[name]
        for row in rows_of(tmp_path, name, tiny_llama):
            taken = int(np.argmax(np.array(row["choice_logprobs"]) / sizes))
            assert row["response"] == prompt["choices"][taken]
            assert row["target"] == prompt["choices"][row["doc_id"]]
            assert row["value"] == float(taken == row["doc_id"])
            assert row["choice_lengths"] == [2, 13, 2]
            assert len(row["choice_logprobs"]) == 3
            assert max(row["choice_logprobs"]) < 0
            assert row["prompt_end"] == prompt["question"][-300:]
    chosen = {name: rows_of(tmp_path, name, tiny_llama)[0]["response"] for name in ("plain", "norm")}
    assert chosen["plain"] != chosen["norm"]  # else the test cannot tell them apart


def test_a_choice_in_the_prompt_and_several_right_ones_are_kept(tmp_path: Path, tiny_llama: Path) -> None:
    blanks = [{"options": ["Ann", "Bob"], "answer": 1, "rest": "ran home."}]
    inputs = {"doc_to_text": "{{answer}}", "doc_to_choice": "{{options}}", "doc_to_target": "{{rest}}"}
    write_task(tmp_path, "blank", blanks, **inputs)
    (row,) = rows_of(tmp_path, "blank", tiny_llama)
    assert (row["target"], len(row["choice_logprobs"])) == ("Bob", 2)
    assert row["response"] in ("Ann", "Bob")
    write_task(tmp_path, "many", [{"question": "?", "choices": ["a", "b", "c"], "label": [0, 2]}])
    assert rows_of(tmp_path, "many", tiny_llama)[0]["target"] == "a | c"


def test_other_outputs_are_kept_in_words(tmp_path: Path, tiny_llama: Path) -> None:
    said = {"doc_to_choice": None, "doc_to_target": "{{answer}}", "doc_to_text": "{{question}}"}
    documents = [{"question": "One, two,", "answer": " three" * 400}]
    acc = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write_task(
        tmp_path, "next", documents, output_type="loglikelihood", metric_list=acc, **said | {"doc_to_target": "3"}
    )
    (row,) = rows_of(tmp_path, "next", tiny_llama)
    assert (row["target"], row["response"], row["choice_logprobs"]) == ("3", None, None)
    match = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write_task(tmp_path, "say", documents, output_type="generate_until", metric_list=match,
               generation_kwargs={"until": [], "max_gen_toks": 8}, **said)  # fmt: skip
    (row,) = rows_of(tmp_path, "say", tiny_llama)
    assert (len(row["target"]), row["choice_lengths"], row["prompt_end"]) == (1000, None, "One, two,")
    assert row["response"]


def test_perplexity_gives_way_to_bits_per_byte(tmp_path: Path, tiny_llama: Path) -> None:
    metrics = [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ]
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_choice": None}
    write_task(tmp_path, "text", [{"text": "Hello."}], **rolling, doc_to_target="{{text}}", metric_list=metrics)
    write_task(tmp_path, "words", [{"text": "Hi."}], **rolling, doc_to_target="{{text}}", metric_list=metrics[:1])
    assert (
        score_model(resolve_model(str(tiny_llama)), TaskSet.load(["text"], [tmp_path])).tasks["text"].metric
        == "bits_per_byte"
    )
    with pytest.raises(BadInput, match=r"words has no metric that is a mean.*word_perplexity"):
        TaskSet.load(["words"], [tmp_path])


def test_an_unknown_task_is_told_with_the_near_name(folder: Path) -> None:
    with pytest.raises(BadInput, match="unknown task 'std_next_lin'; did you mean std_next_line"):
        TaskSet.load(["std_next_lin"], [folder])


def test_yaml_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("task: broken\n  metric_list: [")
    with pytest.raises(BadInput, match=r"broken\.yaml cannot be read"):
        TaskSet.load(["broken"], [tmp_path])


def test_missing_data_and_fields_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "std", tmp_path / "std")
    yaml = tmp_path / "std/std_next_line.yaml"
    yaml.write_text(yaml.read_text().replace("/std_next_line.jsonl", "/gone.jsonl"))
    with pytest.raises(BadInput, match=r"std_next_line cannot be loaded: .*gone\.jsonl") as raised:
        TaskSet.load(["std_next_line"], [tmp_path])
    assert str(yaml) in str(raised.value)
    write_task(tmp_path, "odd", questions(2), output_type="guess")
    with pytest.raises(BadInput, match=r"odd cannot be loaded: .*guess"):
        TaskSet.load(["odd"], [tmp_path])
    with pytest.raises(BadInput, match="nowhere is not a folder"):
        TaskSet.load(["odd"], [tmp_path / "nowhere"])


@pytest.mark.skipif(not (SHARED / "blimp").is_dir(), reason="shared/data/blimp is not here")
def test_blimp_is_a_yaml_away(tmp_path: Path, tiny_llama: Path) -> None:
    names = ("causative", "passive_1")
    files = {name: {"data_files": {"test": str(SHARED / f"blimp/{name}.jsonl")}} for name in names}
    group = {
        "group": "blimp_part",
        "task": [{"task": name, "dataset_kwargs": kwargs} for name, kwargs in files.items()],
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "blimp.yaml").write_text(json.dumps(group))
    scores = score_model(resolve_model(str(tiny_llama)), TaskSet.load(["blimp_part"], [tmp_path], limit=20))
    assert scores.tasks["blimp_part"].documents == 40
    assert scores.tasks["blimp_part"].chance == 0.5
    assert members(scores, "blimp_part") == ["blimp_part::causative", "blimp_part::passive_1"]
