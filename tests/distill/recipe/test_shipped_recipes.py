"""Every shipped recipe begins with the command that runs it, is complete, and runs at tiny scale."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from limbeck.distill.commands.distill import distill
from limbeck.distill.data import corpus
from limbeck.distill.data.blocks import make_blocks, train_tokenizer
from limbeck.distill.data.document import Document
from limbeck.distill.recipe import grid, load
from limbeck.distill.recipe.schema import Objective, Training
from limbeck.distill.training.trainer import Job, train
from limbeck.registry.checkpoints.load import load_model
from limbeck.registry.mlflow.store import Store
from tests import ROOT
from tests.conftest import make_model

SHIPPED = sorted(
    [*ROOT.glob("distill/recipes/*.toml"), ROOT / "quickstart/recipe.toml", ROOT / "quickstart/teacher.toml"]
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_begins_with_the_command_that_runs_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line is a comment with a whole `limbeck distill` command, which the command line accepts."""
    monkeypatch.chdir(ROOT)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# limbeck distill ")
    arguments = shlex.split(first.removeprefix("# limbeck distill "))
    parameters = distill.make_context("distill", arguments).params
    assert parameters["recipe"] == path.relative_to(ROOT)
    assert load.load_recipe(path, list(parameters["overrides"]))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_is_complete(path: Path) -> None:
    """It loads without overrides, sets what a run depends on, and each distilled student has a control."""
    recipe = load.load_recipe(path)
    table = tomllib.loads(path.read_text())
    assert table.keys() >= {"name", "data", "students", "objectives", "training"}
    assert table["data"].keys() >= {"heldout", "max_length"}
    assert table["training"].keys() >= {"optim", "learning_rate", "per_device_train_batch_size"}
    assert len(table["training"].keys() & {"max_steps", "num_train_epochs"}) == 1
    plans = grid.plan_students(recipe)
    assert plans
    if recipe.teacher is not None:
        assert {plan.control is None for plan in plans} == {True, False}


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def test_distilgpt2(
    store: Store, limbeck: Callable[..., Any], text_file: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Two students with 6 of 12 layers of the teacher; one matches its last hidden state."""
    make_model(tmp_path / "gpt2", tokenizer_folder, "gpt2", n_layer=12)
    rows = [{"text": piece} for piece in text_file.read_text().split("\n\n") if piece]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = ["data.max_length=32", "data.heldout=0.2", "training.max_steps=2", "training.per_device_train_batch_size=2"]
    tiny += ["data.path=rows.jsonl", f"teacher.model={tmp_path / 'gpt2'}", "training.gradient_accumulation_steps=2"]
    done = limbeck("distill", ROOT / "distill/recipes/distilgpt2.toml", *sets(*tiny), "--format", "json")
    assert done.code == 0, done.err
    assert [student["recipe"] for student in json.loads(done.out)] == ["distil-distilled", "distil-labels"]
    for number in (2, 3):
        student = AutoModelForCausalLM.from_pretrained(
            store.artifacts.verified_folder(store.get(f"distilgpt2/{number}"))
        )
        assert student.config.n_layer == 6
    recipe = load.load_recipe(ROOT / "distill/recipes/distilgpt2.toml")
    assert recipe.objectives["distilled"].layers is not None
    assert recipe.objectives["distilled"].layers.map == {6: 12}


def test_shakespeare(store: Store, limbeck: Callable[..., Any], text_file: Path) -> None:
    """As in the README: first the teacher, then its students, from the same text file."""
    tiny = ["data.path=" + str(text_file), "data.max_length=32", "training.max_steps=2"]
    tiny += ["training.per_device_train_batch_size=2"]
    folder = ROOT / "distill" / "recipes"
    one = ["--set", "tokenizer.vocab_size=280", "--format", "json"]
    done = limbeck("distill", folder / "shakespeare-teacher.toml", *sets(*tiny), *one)
    assert done.code == 0, done.err
    done = limbeck("distill", folder / "shakespeare.toml", *sets(*tiny), "--format", "json")
    assert done.code == 0, done.err
    assert [student["recipe"] for student in json.loads(done.out)] == ["small-distilled", "small-labels"]
    assert store.get("shakespeare/1").parent == "shakespeare-teacher/1"


# Like DeepSeek's: the template opens the reasoning, and drops it from given answers.
REASONING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n"
    "{% else %}A: {{ m['content'].split('</think>')[-1] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: <think>\n{% endif %}"
)


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_template(folder: Path, template: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def reasoner(folder: Path, tokenizer_folder: Path, rows: list[dict[str, str]], wrong: list[str]) -> Path:
    """A teacher that learnt to answer the questions of `rows` with reasoning, and those in `wrong` falsely."""
    make_model(folder, tokenizer_folder, "qwen2", num_hidden_layers=1)
    tokenizer = with_template(folder, REASONING)
    documents = []
    for row in rows:
        result = "9" if row["question"] in wrong else row["answer"].rpartition(" ")[2]
        prompt = f"Q: {row['question']}\nA: "
        answer = f"<think>\nso {result}\n</think>\n\\boxed{{{result}}}"
        documents.append(Document(row["question"], prompt + answer, prompt=prompt))
    blocks = make_blocks(documents, tokenizer, 64)
    model = load_model(folder)
    training = Training(
        max_steps=200, per_device_train_batch_size=8, optim="muon", learning_rate=2e-2, bf16=False, eval_steps=1000
    )
    train(Job(model, blocks, blocks, Objective(labels=1.0), training, None, folder / "run", 0, len(tokenizer)))
    model.save_pretrained(folder)
    return folder


def test_deepseek_r1(
    store: Store, limbeck: Callable[..., Any], tmp_path: Path, limbeck_home: Path, tokenizer_folder: Path
) -> None:
    """Right answers with reasoning teach a student with the teacher's tokenizer, then one with its own tokenizer."""
    rows = [{"question": f"{a}+{b}=", "answer": f"{a} and {b}.\n#### {a + b}"} for a in range(3) for b in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = ["1+1=", "2+0="]
    teacher = reasoner(tmp_path / "teacher", tokenizer_folder, rows, wrong)
    make_model(tmp_path / "qwen", tokenizer_folder, "qwen2")
    with_template(tmp_path / "qwen", CHAT)
    tokens = train_tokenizer([Document("", "Q: 1+2=\nA: <think>\nso 3\n</think>\n" * 9)], 275, 128)
    tokens.save_pretrained(tmp_path / "tokens")
    make_model(tmp_path / "llama", tmp_path / "tokens", "llama")
    tiny = ["data.max_length=96", "data.heldout=0.2", "training.max_steps=2", "training.gradient_accumulation_steps=1"]
    tiny += ["data.path=rows.jsonl", f"teacher.model={teacher}", "generate.max_new_tokens=40", "generate.samples=2"]
    tiny += ["generate.temperature=0.3"]
    path = ROOT / "distill/recipes/deepseek-r1-distill.toml"
    new_answers = []
    for number, family in enumerate(("qwen", "llama")):
        done = limbeck(
            "distill", path, *sets(*tiny, f"students.student.model={tmp_path / family}"), "--yes", "--format", "json"
        )
        assert done.code == 0, done.err
        made = json.loads(done.out)
        assert [student["recipe"] for student in made] == ["student-traces", "student-untrained"]
        trained, before = (store.get(f"r1-distill/{2 + 2 * number + i}") for i in range(2))
        assert (trained.parent, before.parent) == ("r1-distill/1", None)
        folder = store.artifacts.verified_folder(trained)
        vocabulary = AutoTokenizer.from_pretrained(tmp_path / family).get_vocab()
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == vocabulary
        assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == {"qwen": "qwen2"}.get(family, family)
        assert trained.digest != before.digest
        facts = store.client.get_run(trained.run_id).data.metrics
        new_answers.append(facts["generate.new_answers"])
        parts = (limbeck_home / f"data/r1-distill/{part}.jsonl" for part in ("train", "heldout"))
        learnt = [document for part in parts for document in corpus.read_corpus(part)]
        assert len(learnt) == facts["generate.kept_answers"] == 18 - facts["generate.dropped.verifier"]
        assert facts["generate.dropped.verifier"] >= 2  # the answers that the teacher gets wrong
        for document in learnt:
            question = document.messages[0]["content"] if document.messages else document.prompt.strip()
            answer = document.messages[-1]["content"] if document.messages else document.completion
            assert re.fullmatch(r"<think>\n.+\n?</think>\n.*\S.*", answer, re.DOTALL), answer
            assert answer.endswith(f"\\boxed{{{int(question[0]) + int(question[2])}}}")
        assert bool(learnt[0].messages) == (family == "qwen")  # uses its own chat template if it has one
    assert new_answers == [18, 0]  # the second student learns from the stored answers
