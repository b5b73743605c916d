"""`limbeck tasks check`, and the same check at the start of `limbeck eval` and `limbeck compare`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from limbeck.evals.tasks.faults import FaultyTasks
from limbeck.evals.tasks.task_set import TaskSet
from tests.conftest import Result, make_model
from tests.evals.task_files import questions, write_task

ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_choice": None,
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
WRITTEN = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{answer}}"}


@pytest.fixture(autouse=True)
def home(limbeck_home: Path) -> Path:
    return limbeck_home


def faults_of(folder: Path, *names: str, **settings: Any) -> list[tuple[str, int | None, str | None]]:
    """(kind, document, row) of each fault, in order."""
    found = TaskSet.check(names, [folder], **settings)[1]
    return [(fault.kind, fault.document, fault.row) for fault in found]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"label": 2}, "label out of range"),
        ({"label": -1}, "label out of range"),
        ({"label": None}, "label out of range"),
        ({"label": 0.5}, "label out of range"),
        ({"choices": []}, "empty choice"),
        ({"choices": ["", " 1"]}, "empty choice"),
        ({"choices": [" 1", None]}, "empty choice"),
        ({"choices": None}, "empty choice"),
        ({"question": " \n"}, "empty document"),
        ({"question": ""}, "empty document"),
    ],
)
@pytest.mark.parametrize("place", [0, 2])
def test_a_faulty_document_is_named_with_its_row(tmp_path: Path, row: dict[str, Any], kind: str, place: int) -> None:
    rows = questions(3)
    rows[place] |= row
    columns = {"doc_to_choice": "choices", "doc_to_target": "label"}
    write_task(tmp_path, "sums", rows, **columns)
    assert faults_of(tmp_path, "sums") == [(kind, place, f"line {place + 1}")]


def test_labels_of_every_form_are_read_as_lm_eval_reads_them(tmp_path: Path) -> None:
    good = {"texts": [" 0", " 1"], "lists": [[0], [0, 1]], "rendered": ["0", "1"]}
    bad = {"texts": [" 0", "1"], "lists": [[0], [0, 2]], "rendered": ["0", "-1"], "none": [[0], []]}
    for kind, labels in [*good.items(), *((f"bad_{name}", each) for name, each in bad.items())]:
        rows = [{**row, "label": label} for row, label in zip(questions(2), labels, strict=True)]
        choices = {"doc_to_choice": [" 0", " 1"], "doc_to_target": "{{label}}" if "rendered" in kind else "label"}
        write_task(tmp_path, kind, rows, **choices)
    assert faults_of(tmp_path, *good) == []
    assert faults_of(tmp_path, *(f"bad_{name}" for name in bad)) == [("label out of range", 1, "line 2")] * 4


def test_documents_that_a_task_cannot_render_or_generate_from(tmp_path: Path) -> None:
    write_task(tmp_path, "maths", [{"question": "1?", "answer": "1"}, {"question": "", "answer": "2"}], **WRITTEN)
    write_task(tmp_path, "odd", questions(2), doc_to_text="{{question.split()[place]}}")
    write_task(tmp_path, "blimp", questions(2), doc_to_text="")  # nothing but choices: as it should be
    assert faults_of(tmp_path, "maths") == [("empty document", 1, "line 2")]
    assert [kind for kind, _, _ in faults_of(tmp_path, "odd")] == ["document that does not fit the task"] * 2
    assert faults_of(tmp_path, "blimp") == []


def test_an_empty_text_is_named_and_counts_for_nothing(
    tmp_path: Path, tiny_llama: Path, limbeck: Callable[..., Result]
) -> None:
    texts = ["A fox ran.", "", "It slept."]
    write_task(tmp_path, "whole", [{"text": text} for text in texts], **ROLLING)
    write_task(tmp_path, "rest", [{"text": text} for text in texts if text], **ROLLING)
    assert faults_of(tmp_path, "whole") == [("empty text", 1, "line 2")]
    options = ["--tasks", "whole,rest", "--include-path", tmp_path, "--no-cost", "--format", "json"]
    done = limbeck("eval", tiny_llama, *options)
    assert "whole.jsonl, line 2, document 1: it counts with weight 0" in done.err
    found = json.loads(done.out)[0]["tasks"]
    assert found["whole"]["value"] == pytest.approx(found["rest"]["value"])
    assert limbeck("tasks", "check", "whole", "--include-path", tmp_path).code == 2


def test_a_document_among_its_own_examples(tmp_path: Path) -> None:
    write_task(tmp_path, "leak", questions(4), num_fewshot=3)
    write_task(tmp_path, "apart", questions(4), num_fewshot=3, fewshot_split="test")
    copies = [{**questions(1)[0], "id": number} for number in range(3)]  # a repeat, though not equal
    write_task(tmp_path, "copies", copies, num_fewshot=1, fewshot_split="test")
    kind = "document among its own few-shot examples"
    drawn = {document for found, document, _ in faults_of(tmp_path, "leak") if found == kind}
    assert drawn  # of 4 documents 3 are drawn for each, so most are among their own
    assert faults_of(tmp_path, "apart") == []
    assert faults_of(tmp_path, "copies") == [(kind, n, f"line {n + 1}") for n in range(3)]
    assert faults_of(tmp_path, "leak", num_fewshot=0, samples={"leak": [1]}) == []


LINE = json.dumps(questions(1)[0]).encode()
FILES: dict[str, tuple[bytes, str, str | None]] = {
    "no.jsonl": (b"", "empty file", None),
    "blank.jsonl": (b"\n  \n", "empty file", None),
    "list.json": (b"[]", "empty file", None),
    "head.csv": (b"question,label\n", "empty file", None),
    "latin.jsonl": (LINE + b"\n" + '{"question": "café"}'.encode("latin-1"), "unreadable file", "line 2"),
    "latin.csv": ("question\ncafé\n".encode("latin-1"), "unreadable file", "line 2"),
    "utf16.jsonl": (LINE.decode().encode("utf-16"), "unreadable file", "line 1"),
    "wide.jsonl": (LINE.decode().encode("utf-16-le"), "unreadable file", "line 1"),
    "torn.jsonl": (LINE + b"\n" + LINE[:-5], "unreadable file", "line 2"),
    "text.jsonl": (LINE + b"\n\nhello\n" + LINE, "unreadable file", "line 3"),
    "torn.jsonl.gz": (gzip.compress(LINE)[:-9], "unreadable file", None),
    "empty.jsonl.gz": (gzip.compress(b""), "empty file", None),
    "torn.parquet": (b"PAR1 and no more", "unreadable file", None),
}


@pytest.mark.parametrize("name", FILES)
def test_empty_and_unreadable_files_are_named(tmp_path: Path, name: str) -> None:
    content, kind, row = FILES[name]
    (tmp_path / name).write_bytes(content)
    suffix = "csv" if ".csv" in name else "parquet" if "parquet" in name else "json"
    data = {"dataset_path": suffix, "dataset_kwargs": {"data_files": {"test": str(tmp_path / name)}}}
    write_task(tmp_path, "sums", questions(1), **data)
    assert faults_of(tmp_path, "sums") == [(kind, None, row)]


def test_rows_of_several_files_of_any_format(tmp_path: Path) -> None:
    rows = [{**row, "label": 7} for row in questions(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:1]) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\n" + "\n\n".join(json.dumps(row) for row in rows[1:]))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text('question,label\n"first\nand second line",7\nthird,7\n')
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    cases = {
        "json": (["a.jsonl", "b.jsonl"], ["a.jsonl, line 1", "b.jsonl, line 2", "b.jsonl, line 4"]),
        "list": (["list.json"], [f"list.json, row {n}" for n in (1, 2, 3)]),
        "csv": (["rows.csv"], ["rows.csv, line 2", "rows.csv, line 4"]),
        "parquet": (["rows.parquet"], [f"rows.parquet, row {n}" for n in (1, 2, 3)]),
    }
    for name, (files, places) in cases.items():
        kwargs = {"data_files": {"test": [str(tmp_path / file) for file in files]}}
        options = {"dataset_path": "json" if name == "list" else name, "dataset_kwargs": kwargs}
        write_task(tmp_path, name, [], doc_to_choice=["a", "b"], **options)
        found = [fault.place.rsplit("/", 1)[1] for fault in TaskSet.check([name], [tmp_path])[1]]
        assert found == [f"{place}, document {number}" for number, place in enumerate(places)]


def test_two_files_with_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_task(tmp_path / folder, "twin", questions(2))
    write_task(tmp_path, "other", questions(2))
    with pytest.raises(FaultyTasks, match=r"a/twin\.yaml and .*b/twin\.yaml define it"):
        TaskSet.load(["twin"], [tmp_path])
    assert faults_of(tmp_path / "a", "twin") == faults_of(tmp_path, "other") == []
    with pytest.raises(FaultyTasks):
        TaskSet.load(["twin"], [tmp_path / "a", tmp_path / "b"])


def test_a_folder_is_checked_whole_and_all_faults_are_named_at_once(
    tmp_path: Path, limbeck: Callable[..., Result]
) -> None:
    write_task(tmp_path, "good", questions(3))
    write_task(tmp_path, "labels", [{**row, "label": 5} for row in questions(30)])
    write_task(tmp_path, "gone", questions(1))
    (tmp_path / "gone.jsonl").unlink()
    (tmp_path / "none.yaml").write_text("")
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "latin.yaml").write_bytes("task: café".encode("latin-1"))
    group = {"group": "all", "task": [{"task": "inline", "doc_to_target": 4}], "dataset_path": "json"}
    data = {"data_files": {"test": str(tmp_path / "good.jsonl")}}
    rest = {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}"}
    metrics = {"metric_list": [{"metric": "acc"}], "aggregate_metric_list": [{"metric": "acc"}]}
    whole = {**group, "dataset_kwargs": data, **rest, "doc_to_choice": "choices", **metrics}
    (tmp_path / "all.yaml").write_text(json.dumps(whole))
    done = limbeck("tasks", "check", tmp_path)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "good" in done.out
    for line in (
        "label out of range, task labels: 30\n",
        "labels.jsonl, line 20, document 19: label '5' is none of its choices 0 to 1\n    and 10 more\n",
        "gone.jsonl: it does not exist",
        "none.yaml: it defines no task",
        "broken.yaml: cannot be read",
        "latin.yaml: cannot be read",
    ):
        assert line in done.err
    listed = json.loads(limbeck("tasks", "check", tmp_path, "all", "--format", "json").out)
    kinds = [fault["kind"] for fault in listed["faults"]]
    assert kinds.count("label out of range") == 33  # the group's inline task too
    assert limbeck("tasks", "check", "good", "--include-path", tmp_path).code == 0


def test_eval_and_compare_check_before_a_model_is_loaded(
    tmp_path: Path, tiny_llama: Path, tokenizer_folder: Path, limbeck: Callable[..., Result]
) -> None:
    from transformers import AutoTokenizer

    write_task(tmp_path, "labels", [{**row, "label": 5} for row in questions(2)])
    small = make_model(tmp_path / "small", tokenizer_folder, "llama")
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(small)
    options = ["--tasks", "labels", "--include-path", tmp_path]
    for command in (["eval", small, "--no-cost"], ["compare", small, tiny_llama]):
        done = limbeck(*command, *options)
        assert done.code == 2
        assert "label out of range, task labels: 2" in done.err
        assert "rows, and none for '<think>' (" in done.err
    assert limbeck("tasks", "check", "labels", "--include-path", tmp_path, "--model", small).code == 2


CODE = 'import pathlib\npathlib.Path("{ran}").touch()\ndef label(doc):\n    return doc["label"]\n'


def test_code_beside_a_task_runs_only_if_allowed(
    tmp_path: Path, tiny_llama: Path, limbeck: Callable[..., Result]
) -> None:
    write_task(tmp_path, "coded", questions(2))
    ran = tmp_path / "ran"
    (tmp_path / "helpers.py").write_text(CODE.format(ran=ran))
    base = tmp_path / "coded.yaml"
    base.rename(tmp_path / "base_of_coded")  # the code is in a file that is included
    text = (tmp_path / "base_of_coded").read_text().replace('"{{label}}"', "!function helpers.label")
    (tmp_path / "base_of_coded").write_text(text)
    base.write_text("include: base_of_coded\n")
    options = ["--tasks", "coded", "--include-path", tmp_path, "--no-cost"]
    for command in (["tasks", "check", tmp_path], ["eval", tiny_llama, *options]):
        done = limbeck(*command)
        assert done.code == 2
        assert "coded.yaml: `!function helpers.label`" in done.err
        assert "--allow-task-code" in done.err
        assert not ran.exists()
    assert limbeck("eval", tiny_llama, *options, "--allow-task-code").code == 0
    assert ran.exists()


def test_no_other_way_runs_code(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    write_task(tmp_path, "installed", questions(2), doc_to_target="TARGET")
    file = tmp_path / "installed.yaml"
    file.write_text(file.read_text().replace('"TARGET"', "!function os.system"))
    (tmp_path / "metric.py").write_text(CODE.format(ran=ran))
    write_task(tmp_path, "measured", questions(2), metric_list=[{"metric": str(tmp_path / "metric.py")}])
    known = [{"metric": "acc", "hf_evaluate": True}]
    write_task(tmp_path, "loaded", questions(2), metric_list=known)
    pickled = {"dataset_path": "pandas", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.pkl")}}}
    (tmp_path / "rows.pkl").write_bytes(f"cos\nsystem\n(S'touch {ran}'\ntR.".encode())
    write_task(tmp_path, "pickled", questions(2), **pickled)
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}"
    write_task(tmp_path, "template", questions(1), doc_to_text=escape)
    for name in ("installed", "measured", "loaded", "pickled"):
        assert faults_of(tmp_path, name) == [("code of a task", None, None)]
    assert {kind for kind, _, _ in faults_of(tmp_path, "template")} == {"document that does not fit the task"}
    assert not ran.exists()


def test_warnings_of_lm_eval_are_shown(tmp_path: Path, limbeck: Callable[..., Result]) -> None:
    write_task(tmp_path, "bare", questions(2), metric_list=[{"metric": "acc"}])
    done = limbeck("tasks", "check", "bare", "--include-path", tmp_path)
    assert done.code == 0
    assert done.err.count("metric acc is defined, but aggregation is not") == 1
