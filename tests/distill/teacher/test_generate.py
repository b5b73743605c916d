"""Text that a local teacher writes: stored, filtered, laid out, and the same after a kill."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.distill import context
from limbeck.distill.data import corpus, prompts
from limbeck.distill.models.sampling import TextSampler
from limbeck.distill.recipe import load as load_module
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Generate
from limbeck.distill.run import prepare
from limbeck.distill.teacher import generate
from limbeck.distill.teacher.answer_cache import AnswerCache
from limbeck.registry.mlflow.store import Store
from tests.conftest import make_model

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As DeepSeek's: it opens the reasoning, and drops the reasoning of earlier answers.
THINKING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


def with_template(folder: Path, to: Path, template: str) -> Path:
    """A copy of a model whose tokenizer has a chat template."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def chat_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return with_template(tiny_llama, tmp_path_factory.mktemp("chat-teacher"), TEMPLATE)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twelve rows in the form of GSM8K."""
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is {n} and {n}.\n#### {2 * n}"} for n in range(12)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(path: Path, store: Store, *overrides: str) -> context.Setting:
    recipe = load_module.load_recipe(path, list(overrides))
    return prepare.prepare_setting(recipe, Source(path, overrides), store)


def sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def stored_answers(home: Path) -> list[Any]:
    """The rows of the answer cache."""
    with sqlite3.connect(home / "completions.db") as file:
        return file.execute("SELECT answer FROM completions").fetchall()


GENERATE = "[generate]\nmax_new_tokens = 6\nbatch_size = 4\n[generate.filter]\nfinished = false\n"
ASK = ["data.path=questions.jsonl", "data.prompt_column=question"]


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_answers_become_the_text_of_the_students(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, limbeck_home: Path, questions: Path
) -> None:
    recipe = write_recipe(tiny_llama, extra=GENERATE + "[sweep]\nseeds = [1, 2]\n")
    args = sets(*ASK, "generate.samples=3", "generate.max_prompts=10")
    done = limbeck("distill", recipe, *args, "--format", "json")
    assert done.code == 0, done.err
    assert "10 prompts; 30 of 30 answers kept; 30 written now" in done.err
    made = json.loads(done.out)
    assert [student["parent"] for student in made] == ["tiny/1", "tiny/1"]  # made from the teacher's text
    parts = [
        [json.loads(line) for line in (limbeck_home / "data" / "tiny" / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "heldout")
    ]
    train, heldout = (Counter(row["path"] for row in part) for part in parts)
    assert set(train.values()) | set(heldout.values()) == {3}  # all samples of a prompt are in one part
    assert len(train) + len(heldout) == 10
    assert not train.keys() & heldout.keys()
    for row in parts[0] + parts[1]:
        assert row["prompt"].startswith("What is ")
        assert row["text"].startswith(row["prompt"])
        assert len(row["text"]) > len(row["prompt"])
    assert len({row["text"] for row in parts[0]}) > 2 * len(train)  # and the samples differ
    run = store.client.get_run(store.get("tiny/2").run_id).data
    assert (run.metrics["generate.kept_answers"], run.metrics["generate.prompts"]) == (30, 10)
    assert run.params["generate.samples"] == "3"
    making = store.runs.training_cost(store.get("tiny/2"))
    assert making
    assert making.teacher_seconds == pytest.approx(run.metrics["generate.seconds"])
    assert making.teacher_seconds > 0
    assert making.students_sharing_teacher == 2

    # Two more prompts cost their answers; another filter costs none.
    more = [*ASK, "generate.samples=3", "generate.max_prompts=12"]
    _, facts = generate.generate_text(prepared(recipe, store, *more))
    assert (facts.kept_answers, facts.new_answers) == (36, 6)
    logprobs = [json.loads(zlib.decompress(row[0]))["logprob"] for row in stored_answers(limbeck_home)]
    strict = [*more, f"generate.filter.min_logprob={np.median(logprobs)}"]
    _, facts = generate.generate_text(prepared(recipe, store, *strict))
    assert (facts.kept_answers, facts.dropped, facts.new_answers) == (18, {"min_logprob": 18}, 0)


def test_a_killed_run_keeps_its_answers_and_writes_the_same_text(
    store: Store,
    write_recipe: WriteRecipe,
    tiny_llama: Path,
    tmp_path: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(tiny_llama, extra=GENERATE)

    def digest(home: str) -> tuple[str, int]:
        monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / home))
        text, facts = generate.generate_text(prepared(recipe, store, *ASK))
        return text.digest, facts.new_answers

    assert digest("unbroken") == (digest("also unbroken")[0], 12)
    add = AnswerCache.add

    def add_and_die(self: AnswerCache, answers: dict[str, Any]) -> None:
        add(self, answers)
        if self.get("dies") is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, {"dies": True})  # with the next batch

    if (child := os.fork()) == 0:
        monkeypatch.setattr(AnswerCache, "add", add_and_die)
        digest("killed")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert digest("killed") == (digest("unbroken")[0], 4)


def test_an_empty_text_is_reported_with_the_counts(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(tiny_llama, extra=GENERATE)
    verify = ['generate.filter.verifier="final_answer"', 'generate.filter.answer_column="answer"']
    done = limbeck("distill", recipe, *sets(*ASK, *verify))
    assert done.code == 2
    assert "recipe.toml" in done.err
    assert "0 of 12 answers kept; dropped: 12 by verifier" in done.err
    assert "the answers stay stored" in done.err
    assert store.versions("tiny") == [] or [v.kind for v in store.versions("tiny")] == ["teacher"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["generate.chat=true"], "the teacher's tokenizer has no chat template"),
        (['generate.system_prompt="Be brief."'], "a system prompt cannot be given"),
        (["generate.max_new_tokens=125"], "none of 12 prompts leaves room for 125 new tokens"),
        (['generate.filter.answer_column="solution"'], " has no 'solution'"),
        (['generate.filter.verifier="nowhere:at_all"'], "'nowhere:at_all' cannot be imported"),
        (["generate.temperature=0", "generate.samples=2"], "at temperature 0"),
        (['generate.filter.regex="("'], "is not a regular expression"),
        (["students.small.config.hiden_size=32"], "has no setting 'hiden_size'"),
        (['data.prompt_column="query"'], "no column 'query'"),
    ],
)
@pytest.mark.usefixtures("store", "questions")
def test_bad_settings_are_reported_before_the_teacher_is_loaded(
    limbeck: Limbeck,
    write_recipe: WriteRecipe,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(TextSampler, "__init__", lambda *_, **__: pytest.fail("the teacher was loaded"))
    done = limbeck("distill", write_recipe(tiny_llama, extra=GENERATE), *sets(*ASK, *changes))
    assert done.code == 2
    assert message in done.err


def test_prompts_and_answers_go_through_the_chat_template(
    store: Store, write_recipe: WriteRecipe, chat_teacher: Path, questions: Path
) -> None:
    before = prepared(write_recipe(chat_teacher, extra=GENERATE), store, *ASK, 'generate.system_prompt="Be brief."')
    text, _ = generate.generate_text(before)
    _, tokenizer = load(chat_teacher)
    document = next(iter(corpus.read_corpus(text.train)))
    assert [turn["role"] for turn in document.messages] == ["system", "user", "assistant"]
    assert document.messages[0]["content"] == "Be brief."
    # The same request, by hand.
    question = document.messages[1]["content"]
    ids = tokenizer(f"<system>Be brief.\n<user>{question}\n<assistant>", add_special_tokens=False)["input_ids"]
    [prompt] = [p for p in prompts.load_prompts(before.recipe.data, Generate(), questions.parent) if p.text == question]
    writer, _ = generate._writer(before, [prompt], AnswerCache())
    request = writer.request(prompt, 7)
    assert request
    assert request["ids"] == ids
    # Without chat the prompt is plain text after the start token.
    plain = prepared(write_recipe(chat_teacher, extra=GENERATE), store, *ASK, "generate.chat=false")
    writer, _ = generate._writer(plain, [prompt], AnswerCache())
    request = writer.request(prompt, 7)
    assert request
    assert request["ids"] == [tokenizer.eos_token_id, *tokenizer(question)["input_ids"]]


def test_the_text_has_the_whole_reasoning_for_any_template(
    store: Store, write_recipe: WriteRecipe, tiny_llama: Path, questions: Path, tmp_path: Path
) -> None:
    (tmp_path / "thinking").mkdir()
    thinking = with_template(tiny_llama, tmp_path / "thinking", THINKING)
    before = prepared(write_recipe(thinking, extra=GENERATE), store, *ASK)
    [prompt, *_] = prompts.load_prompts(before.recipe.data, Generate(), tmp_path)
    writer, by_chat = generate._writer(before, [prompt], AnswerCache())
    request = writer.request(prompt, 7)
    assert request
    assert request["opening"] == "<think>\n"
    text, _ = generate.generate_text(before)
    assert all(d.messages[-1]["content"].startswith("<think>\n") for d in corpus.read_corpus(text.train))
    # This template drops the reasoning: the document is the rendered prompt and the answer, as plain text.
    document = prompts.document_layout(before.tokenizer, by_chat, None)(prompt, "<think>\nhm\n</think>\n4")
    assert document.prompt == f"<user>{prompt.text}\n<assistant>"
    assert document.completion == "<think>\nhm\n</think>\n4"
    # A template that keeps the reasoning renders the whole document.
    before.tokenizer.chat_template = TEMPLATE
    document = prompts.document_layout(before.tokenizer, by_chat, None)(prompt, "<think>\nhm\n</think>\n4")
    assert document.messages[-1] == {"role": "assistant", "content": "<think>\nhm\n</think>\n4"}


def test_a_student_with_another_tokenizer_learns_from_the_text(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, tmp_path: Path, questions: Path
) -> None:
    from limbeck.distill.data.blocks import train_tokenizer
    from limbeck.distill.data.document import Document

    other = train_tokenizer([Document("", "What is it? It is what is to be."), Document("", "1 2 3 4")], 280, 128)
    other.save_pretrained(tmp_path / "tokenizer")
    student = make_model(tmp_path / "student", tmp_path / "tokenizer", "gpt2")
    recipe = write_recipe(tiny_llama, extra=GENERATE)
    recipe.write_text(recipe.read_text().replace("[students.small.config]", "[students.small]\nmodel = 'student'\n[x]"))
    recipe.write_text(recipe.read_text().split("[x]")[0] + "[objectives" + recipe.read_text().split("[objectives")[1])
    done = limbeck("distill", recipe, *sets(*ASK), "--yes")
    assert done.code == 0, done.err
    folder = store.artifacts.verified_folder(store.get("tiny/2"))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(student).get_vocab()


def test_limbeck_data_writes_the_text(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, limbeck_home: Path, questions: Path
) -> None:
    done = limbeck("data", write_recipe(tiny_llama, extra=GENERATE), *sets(*ASK), "--format", "json")
    assert done.code == 0, done.err
    text = json.loads(done.out)
    assert text["train_documents"] + text["heldout_documents"] == 12
    assert all(document.prompt for document in corpus.read_corpus(Path(text["train"])))
