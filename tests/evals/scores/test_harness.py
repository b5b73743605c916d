"""Scores equal lm-eval's own, document by document, and have the columns that comparisons need."""

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
from limbeck.evals.tasks.task_set import TaskSet, TaskSettings
from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.core.errors import BadInput
from tests import ROOT
from tests.conftest import make_model
from tests.evals.task_files import questions, write_task

NAMES = ["std_bits_per_byte", "std_minimal_pairs", "std_next_line"]
RULES = ("swapped_bracket", "misplaced_keyword", "undefined_name", "wrong_indentation")
SHARED = ROOT.parent / "shared/data"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One state folder for the tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Path:
    """A folder with three kinds of tasks, 8 documents each."""
    folder = tmp_path_factory.mktemp("tasks")
    make_tasks(sources, folder, "std", documents=8)
    return folder


@pytest.fixture(scope="module")
def tasks(folder: Path) -> TaskSet:
    return TaskSet.load(NAMES, [folder])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A model with a context long enough for whole snippets."""
    return make_model(tmp_path_factory.mktemp("llama"), tokenizer_folder, "llama", max_position_embeddings=300)


@pytest.fixture(scope="module")
def scores(tasks: TaskSet, llama: Path) -> Scores:
    return score_model(resolve_model(str(llama)), tasks)


def test_values_and_hashes_equal_those_of_hflm(folder: Path, scores: Scores, llama: Path) -> None:
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
    hflm_rows = {(name, row["doc_id"]): row for name, rows in results["samples"].items() for row in rows}
    assert ours.keys() == hflm_rows.keys()
    for key, row in ours.items():
        assert (row["doc_hash"], row["prompt_hash"]) == (hflm_rows[key]["doc_hash"], hflm_rows[key]["prompt_hash"])


def test_a_metric_is_the_weighted_mean_of_its_documents(scores: Scores) -> None:
    assert scores.documents.schema == DOCUMENT_SCHEMA
    table = scores.documents.to_pandas()
    for name, result in scores.tasks.items():
        rows = table[[task in (name, *members(scores, name)) for task in table["task"]]]
        assert np.average(rows["value"], weights=rows["weight"]) == pytest.approx(result.value, abs=1e-9)
        assert len(rows) == result.documents
        assert set(rows["metric"]) == {result.metric}


def members(scores: Scores, group: str) -> list[str]:
    """The tasks of a group."""
    return [name for name, result in scores.tasks.items() if result.group == group]


def test_results_have_groups_chance_and_clusters(scores: Scores, sources: Path) -> None:
    assert set(members(scores, "std_minimal_pairs")) == {f"std_minimal_pairs_{rule}" for rule in RULES}
    assert [name for name, result in scores.tasks.items() if result.group is None] == NAMES
    assert {name: scores.tasks[name].chance for name in NAMES} == {
        "std_minimal_pairs": 0.5,
        "std_bits_per_byte": pytest.approx(3.11, abs=0.01),
        "std_next_line": 0.25,
    }
    assert scores.tasks["std_bits_per_byte"].chance_source == "xz"
    assert not scores.tasks["std_bits_per_byte"].higher_is_better
    assert scores.tasks["std_next_line"].higher_is_better
    paths = {json.loads(line)["path"] for line in sources.read_text().splitlines()}
    assert set(scores.documents["cluster"].to_pylist()) <= paths
    assert all(result.stderr is not None and result.stderr >= 0 for result in scores.tasks.values())


def test_onnx_scores_equal_those_of_pytorch(tasks: TaskSet, scores: Scores, llama: Path, onnx: Any) -> None:
    progress: list[tuple[int, int]] = []
    onnx_scores = score_model(
        resolve_model(str(onnx(llama))), tasks, on_progress=lambda done, total: progress.append((done, total))
    )
    assert progress[-1] == (tasks.requests, tasks.requests)
    assert onnx_scores.prompts_digest == scores.prompts_digest
    onnx_rows, torch_rows = onnx_scores.documents.to_pandas(), scores.documents.to_pandas()
    numbers = ["value", "choice_logprobs"]
    assert onnx_rows.drop(columns=numbers).equals(torch_rows.drop(columns=numbers))
    assert np.allclose(onnx_rows["value"], torch_rows["value"], atol=1e-4)
    logprobs = (rows["choice_logprobs"].dropna() for rows in (onnx_rows, torch_rows))
    for ours, theirs in zip(*logprobs, strict=True):
        assert np.allclose(ours, theirs, atol=1e-4)


def test_the_digest_covers_documents_and_settings_but_not_paths(folder: Path, tmp_path: Path, sources: Path) -> None:
    def digest(path: Path, **settings: Any) -> str:
        return TaskSet.load(["std_bits_per_byte", "std_next_line"], [path], **settings).digest

    first = digest(folder)
    make_tasks(sources, tmp_path / "again", "std", documents=8)
    make_tasks(sources, tmp_path / "more", "std", documents=9)
    assert digest(tmp_path / "again") == first
    assert len({first, digest(tmp_path / "more"), digest(folder, limit=4)}) == 3


def test_a_limit_takes_a_random_sample_that_the_result_records(tmp_path: Path, tiny_llama: Path) -> None:
    write_task(tmp_path, "sums", questions(200))
    model = resolve_model(str(tiny_llama))

    def sampled(limit: int, seed: int = 0) -> tuple[list[int], Any]:
        scores = score_model(model, TaskSet.load(["sums"], [tmp_path], limit=limit, limit_seed=seed))
        return scores.documents["doc_id"].to_pylist(), scores.tasks["sums"]

    (few, result), (more, _), (other, _), (all_of_them, whole) = sampled(6), sampled(8), sampled(6, 1), sampled(200)
    assert (result.documents, result.of_documents, result.limit_seed) == (6, 200, 0)
    assert (whole.documents, whole.of_documents, whole.limit_seed) == (200, 200, None)
    assert whole.task_hash == TaskSet.load(["sums"], [tmp_path]).task_hashes["sums"]
    assert few == sorted(few)
    assert set(few) < set(more)  # so that a larger limit answers only the new requests
    assert few not in (other, list(range(6)))
    assert all_of_them == list(range(200))
    picked = TaskSet.load(["sums"], [tmp_path], samples={"sums": few})
    assert picked.digest != TaskSet.load(["sums"], [tmp_path], limit=6).digest  # picked documents are no random sample


def test_a_sample_gives_every_document_the_same_chance() -> None:
    drawn = [TaskSettings(limit=20, limit_seed=seed).document_numbers("any", 100) or [] for seed in range(500)]
    counts = np.bincount(np.concatenate(drawn), minlength=100)  # of each, expected 100 with a deviation of 9
    assert (counts.sum(), len(counts)) == (10_000, 100)
    assert np.abs(counts - 100).max() < 40


def test_few_shot_examples_change_the_prompts(tmp_path: Path, tiny_llama: Path) -> None:
    write_task(tmp_path, "sums", questions(6), fewshot_split="test")
    write_task(tmp_path, "fixed", questions(6), num_fewshot=0)
    zero_shot, two_shot = (TaskSet.load(["sums", "fixed"], [tmp_path], num_fewshot=count) for count in (None, 2))
    assert two_shot.digest != zero_shot.digest
    assert two_shot.task_hashes["fixed"] == zero_shot.task_hashes["fixed"]
    model = resolve_model(str(tiny_llama))
    twice = [score_model(model, two_shot) for _ in range(2)]
    assert twice[0].prompts_digest == twice[1].prompts_digest != score_model(model, zero_shot).prompts_digest


def test_a_group_without_weights_is_the_mean_of_its_tasks_means(tmp_path: Path, tiny_llama: Path) -> None:
    write_task(tmp_path, "one", questions(3))
    wrong_labels = [row | {"label": 0} for row in questions(13)[3:]]
    write_task(tmp_path, "two", wrong_labels)
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


def test_generated_answers_that_are_all_wrong_score_0(tmp_path: Path, tiny_llama: Path, onnx_llama: Path) -> None:
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


def score_documents(folder: Path, name: str, model: Path) -> list[dict[str, Any]]:
    """Score a model on one task and return its documents."""
    return score_model(resolve_model(str(model)), TaskSet.load([name], [folder])).documents.to_pylist()


def test_rows_have_the_choices_and_the_one_the_model_took(tmp_path: Path, tiny_llama: Path) -> None:
    prompt = {"question": "x" * 400 + " 1 + 1 =", "choices": [" 2", " the lazy dog", " é"], "label": 2}
    norm = [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
    both = [{"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True}]
    for name, metrics in {"plain": {}, "norm": {"metric_list": norm}, "bytes": {"metric_list": both}}.items():
        write_task(tmp_path, name, [prompt | {"label": label} for label in range(3)], target_delimiter="", **metrics)
        sizes = {"plain": [1, 1, 1], "norm": [2, 13, 2], "bytes": [2, 13, 3]}[name]
        for row in score_documents(tmp_path, name, tiny_llama):
            taken = int(np.argmax(np.array(row["choice_logprobs"]) / sizes))
            assert row["response"] == prompt["choices"][taken]
            assert row["target"] == prompt["choices"][row["doc_id"]]
            assert row["value"] == float(taken == row["doc_id"])
            assert row["choice_lengths"] == [2, 13, 2]
            assert len(row["choice_logprobs"]) == 3
            assert max(row["choice_logprobs"]) < 0
            assert row["prompt_end"] == prompt["question"][-300:]
    chosen = {name: score_documents(tmp_path, name, tiny_llama)[0]["response"] for name in ("plain", "norm")}
    assert chosen["plain"] != chosen["norm"]  # else this test could not distinguish the metrics


def test_rows_have_choices_in_the_prompt_and_several_right_choices(tmp_path: Path, tiny_llama: Path) -> None:
    blanks = [{"options": ["Ann", "Bob"], "answer": 1, "rest": "ran home."}]
    inputs = {"doc_to_text": "{{answer}}", "doc_to_choice": "{{options}}", "doc_to_target": "{{rest}}"}
    write_task(tmp_path, "blank", blanks, **inputs)
    (row,) = score_documents(tmp_path, "blank", tiny_llama)
    assert (row["target"], len(row["choice_logprobs"])) == ("Bob", 2)
    assert row["response"] in ("Ann", "Bob")
    write_task(tmp_path, "many", [{"question": "?", "choices": ["a", "b", "c"], "label": [0, 2]}])
    assert score_documents(tmp_path, "many", tiny_llama)[0]["target"] == "a | c"


def test_rows_have_the_text_of_other_outputs(tmp_path: Path, tiny_llama: Path) -> None:
    texts = {"doc_to_choice": None, "doc_to_target": "{{answer}}", "doc_to_text": "{{question}}"}
    documents = [{"question": "One, two,", "answer": " three" * 400}]
    acc = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write_task(
        tmp_path, "next", documents, output_type="loglikelihood", metric_list=acc, **texts | {"doc_to_target": "3"}
    )
    (row,) = score_documents(tmp_path, "next", tiny_llama)
    assert (row["target"], row["response"], row["choice_logprobs"]) == ("3", None, None)
    match = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write_task(tmp_path, "say", documents, output_type="generate_until", metric_list=match,
               generation_kwargs={"until": [], "max_gen_toks": 8}, **texts)  # fmt: skip
    (row,) = score_documents(tmp_path, "say", tiny_llama)
    assert (len(row["target"]), row["choice_lengths"], row["prompt_end"]) == (1000, None, "One, two,")
    assert row["response"]


def test_bits_per_byte_is_preferred_to_perplexity(tmp_path: Path, tiny_llama: Path) -> None:
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


def test_an_unknown_task_is_refused_with_a_similar_name(folder: Path) -> None:
    with pytest.raises(BadInput, match="unknown task 'std_next_lin'; did you mean std_next_line"):
        TaskSet.load(["std_next_lin"], [folder])


def test_an_unreadable_yaml_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("task: broken\n  metric_list: [")
    with pytest.raises(BadInput, match=r"broken\.yaml: cannot be read"):
        TaskSet.load(["broken"], [tmp_path])


def test_missing_data_and_fields_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "std", tmp_path / "std")
    yaml = tmp_path / "std/std_next_line.yaml"
    yaml.write_text(yaml.read_text().replace("/std_next_line.jsonl", "/gone.jsonl"))
    with pytest.raises(BadInput, match=r"std_next_line\n.*gone\.jsonl: it does not exist"):
        TaskSet.load(["std_next_line"], [tmp_path])
    write_task(tmp_path, "odd", questions(2), output_type="guess")
    with pytest.raises(BadInput, match=r"cannot be loaded, task odd\n.*odd\.yaml: .*guess"):
        TaskSet.load(["odd"], [tmp_path])
    with pytest.raises(BadInput, match="nowhere is not a folder"):
        TaskSet.load(["odd"], [tmp_path / "nowhere"])


@pytest.mark.skipif(not (SHARED / "blimp").is_dir(), reason="shared/data/blimp is missing")
def test_blimp_runs_from_one_yaml_file(tmp_path: Path, tiny_llama: Path) -> None:
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
