"""Text that a local teacher writes: drawn as the recipe says, kept, filtered, laid out, and the same after a kill."""

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
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.distill import context
from limbeck.distill.data import corpus, prompts
from limbeck.distill.models.sampling import SeededSampling, TextSampler
from limbeck.distill.recipe import load as load_module
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Data, Generate
from limbeck.distill.run import prepare
from limbeck.distill.teacher import generate
from limbeck.distill.teacher.answer_cache import AnswerCache
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from tests.conftest import make_model

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As DeepSeek's: it opens the reasoning, and leaves that of a finished answer out.
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
def chatty(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return with_template(tiny_llama, tmp_path_factory.mktemp("chatty"), TEMPLATE)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twelve rows of the shape of GSM8K."""
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is {n} and {n}.\n#### {2 * n}"} for n in range(12)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(path: Path, store: Store, *overrides: str) -> context.Setting:
    recipe = load_module.load_recipe(path, list(overrides))
    return prepare.prepare_setting(recipe, Source(path, overrides), store)


def sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def rows_of(home: Path) -> list[Any]:
    """What is in the file of kept answers."""
    with sqlite3.connect(home / "completions.db") as file:
        return file.execute("SELECT answer FROM completions").fetchall()


GENERATE = "[generate]\nmax_new_tokens = 6\nbatch_size = 4\n[generate.filter]\nfinished = false\n"
ASK = ["data.path=questions.jsonl", "data.prompt_column=question"]


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# --- sampling


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_answers_are_those_of_transformers_one_by_one(family: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = load(request.getfixturevalue(f"tiny_{family}"))
    asked = [
        tokenizer(text)["input_ids"] for text in ("def add(", "class Vessel:\n    def", "import", "for i in range")
    ]
    writer = TextSampler(model, tokenizer, vocab_size=300, max_new_tokens=12, temperature=0.0)
    for ids, answer in zip(asked, writer.answers(asked, [0] * len(asked)), strict=True):
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        assert answer.text == tokenizer.decode(wanted, skip_special_tokens=True)
        assert answer.finished == (wanted[-1] == tokenizer.eos_token_id)
        assert answer.tokens == len(wanted) - answer.finished
        with torch.no_grad():  # the mean log-probability, from one pass over the whole
            whole = torch.cat([torch.tensor(ids), wanted])
            logprobs = model(whole[None]).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert answer.logprob == pytest.approx(float(logprobs.gather(-1, wanted[:, None]).mean()), abs=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.5)])
def test_tokens_are_drawn_from_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0, 9.0])  # the last is padding of the vocabulary
    rows = 20_000
    draws = SeededSampling(range(rows), 3, 1, 5, temperature, top_p)
    chosen = draws(torch.zeros((rows, 3), dtype=torch.long), logits.expand(rows, -1)).argmax(-1).numpy()
    probs = np.exp(np.array([2.0, 1.0, 0.5, -1.0, 0.0]) / temperature)
    probs /= probs.sum()
    order = np.argsort(-probs)
    inside = order[: np.searchsorted(probs[order].cumsum(), top_p - 1e-9) + 1]  # the fewest that reach top_p
    wanted = np.zeros(6)
    wanted[inside] = probs[inside] / probs[inside].sum()
    found = np.bincount(chosen, minlength=6) / rows
    assert (found[wanted == 0] == 0).all()
    assert found == pytest.approx(wanted, abs=4 * np.sqrt(0.25 / rows))
    # Kept at temperature 1, whatever it was drawn at.
    assert float(draws.logprobs[0][0]) == pytest.approx(float(logits[:5].log_softmax(-1)[chosen[0]]))


def test_an_answer_depends_on_its_seed_and_not_on_its_batch(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    writer = TextSampler(model, tokenizer, vocab_size=300, max_new_tokens=10)
    asked = [tokenizer(text)["input_ids"] for text in ("def add(", "class Vessel:\n    def", "import")]
    together = [answer.text for answer in writer.answers(asked, [1, 2, 3])]
    assert [writer.answers([ids], [seed])[0].text for ids, seed in zip(asked, [1, 2, 3], strict=True)] == together
    assert writer.answers(asked[:1], [4])[0].text != together[0]


def test_a_stop_string_ends_an_answer(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    asked = [tokenizer(text)["input_ids"] for text in ("def add(", "class Vessel:")]
    settings: dict[str, Any] = dict(vocab_size=300, max_new_tokens=20, temperature=0.0)
    whole = [answer.text for answer in TextSampler(model, tokenizer, **settings).answers(asked, [0, 0])]
    stop = whole[0][4:7]
    first, second = TextSampler(model, tokenizer, stop=(stop,), **settings).answers(asked, [0, 0])
    assert first.text == whole[0][: whole[0].index(stop)]
    assert first.finished
    assert first.tokens < 20
    assert second.text == whole[1].partition(stop)[0]


# --- a whole recipe


def test_answers_become_the_text_that_students_learn(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, limbeck_home: Path, questions: Path
) -> None:
    recipe = write_recipe(tiny_llama, extra=GENERATE + "[sweep]\nseeds = [1, 2]\n")
    args = sets(*ASK, "generate.samples=3", "generate.max_prompts=10")
    done = limbeck("distill", recipe, *args, "--format", "json")
    assert done.code == 0, done.err
    assert "10 prompts; 30 of 30 answers kept; 30 written now" in done.err
    made = json.loads(done.out)
    assert [student["parent"] for student in made] == ["tiny/1", "tiny/1"]  # made from the teacher's words
    parts = [
        [json.loads(line) for line in (limbeck_home / "data" / "tiny" / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "heldout")
    ]
    train, heldout = (Counter(row["path"] for row in part) for part in parts)
    assert set(train.values()) | set(heldout.values()) == {3}  # the samples of a prompt are on one side
    assert len(train) + len(heldout) == 10
    assert not train.keys() & heldout.keys()
    for row in parts[0] + parts[1]:
        assert row["prompt"].startswith("What is ")
        assert row["text"].startswith(row["prompt"])
        assert len(row["text"]) > len(row["prompt"])
    assert len({row["text"] for row in parts[0]}) > 2 * len(train)  # and differ
    run = store.client.get_run(store.get("tiny/2").run_id).data
    assert (run.metrics["generate.kept_answers"], run.metrics["generate.prompts"]) == (30, 10)
    assert run.params["generate.samples"] == "3"
    making = store.runs.training_cost(store.get("tiny/2"))
    assert making
    assert making.teacher_seconds == pytest.approx(run.metrics["generate.seconds"])
    assert making.teacher_seconds > 0
    assert making.students_sharing_teacher == 2

    # Two more prompts are asked for; other filters ask for nothing.
    more = [*ASK, "generate.samples=3", "generate.max_prompts=12"]
    _, facts = generate.generate_text(prepared(recipe, store, *more))
    assert (facts.kept_answers, facts.new_answers) == (36, 6)
    worth = [json.loads(zlib.decompress(row[0]))["logprob"] for row in rows_of(limbeck_home)]
    strict = [*more, f"generate.filter.min_logprob={np.median(worth)}"]
    _, facts = generate.generate_text(prepared(recipe, store, *strict))
    assert (facts.kept_answers, facts.dropped, facts.new_answers) == (18, {"min_logprob": 18}, 0)


def test_a_kill_loses_nothing_that_was_kept_and_changes_nothing(
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


def test_nothing_left_to_learn_from_is_told_with_the_counts(
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
        (['generate.filter.regex="("'], "no regular expression"),
        (["students.small.config.hiden_size=32"], "has no setting 'hiden_size'"),
        (['data.prompt_column="query"'], "no column 'query'"),
    ],
)
def test_what_cannot_be_is_told_before_the_teacher_is_loaded(
    store: Store,
    limbeck: Limbeck,
    write_recipe: WriteRecipe,
    tiny_llama: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(TextSampler, "__init__", lambda *_, **__: pytest.fail("the teacher was loaded"))
    done = limbeck("distill", write_recipe(tiny_llama, extra=GENERATE), *sets(*ASK, *changes))
    assert done.code == 2
    assert message in done.err


# --- prompts


def test_plain_text_gives_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten " * 4)
    (tmp_path / "b.txt").write_text("short")
    found = prompts.load_prompts(Data(path="."), Generate(), tmp_path)
    assert {prompt.path: prompt.text for prompt in found if prompt.path == "a.txt"} == {
        "a.txt": "one two three four five six seven eight nine ten one two three four five six seven eight nine ten"
    }
    [short] = prompts.load_prompts(Data(path=".", max_length=8), Generate(max_prompts=1), tmp_path)
    assert len(short.text) <= 16


def test_conversations_are_answered_after_the_last_users_turn(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"m": m}) + "\n" for m in ([user, answer, user, answer], [user])))
    found = prompts.load_prompts(Data(path="chats.jsonl", messages_column="m"), Generate(), tmp_path)
    assert sorted(len(prompt.messages) for prompt in found) == [1, 3]
    assert {prompt.messages[-1]["role"] for prompt in found} == {"user"}
    path.write_text(json.dumps({"m": [answer]}) + "\n")
    with pytest.raises(BadInput, match=r"chats.jsonl:0000000: the last message is not the user's"):
        prompts.load_prompts(Data(path="chats.jsonl", messages_column="m"), Generate(), tmp_path)


def test_prompts_go_through_the_chat_template_and_answers_are_learnt_through_it(
    store: Store, write_recipe: WriteRecipe, chatty: Path, questions: Path
) -> None:
    before = prepared(write_recipe(chatty, extra=GENERATE), store, *ASK, 'generate.system_prompt="Be brief."')
    text, _ = generate.generate_text(before)
    _, tokenizer = load(chatty)
    document = next(iter(corpus.read_corpus(text.train)))
    assert [turn["role"] for turn in document.messages] == ["system", "user", "assistant"]
    assert document.messages[0]["content"] == "Be brief."
    # The same answer from the same prompt, by hand.
    question = document.messages[1]["content"]
    ids = tokenizer(f"<system>Be brief.\n<user>{question}\n<assistant>", add_special_tokens=False)["input_ids"]
    [prompt] = [p for p in prompts.load_prompts(before.recipe.data, Generate(), questions.parent) if p.text == question]
    writer, _ = generate._writer(before, [prompt], AnswerCache())
    request = writer.request(prompt, 7)
    assert request
    assert request["ids"] == ids
    # Without chat the prompt is plain, after the token that starts a text.
    plain = prepared(write_recipe(chatty, extra=GENERATE), store, *ASK, "generate.chat=false")
    writer, _ = generate._writer(plain, [prompt], AnswerCache())
    request = writer.request(prompt, 7)
    assert request
    assert request["ids"] == [tokenizer.eos_token_id, *tokenizer(question)["input_ids"]]


def test_reasoning_is_learnt_whole_whatever_the_template_does_with_it(
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
    # This template drops what was thought: then the prompt is what it gives, in plain, and the answer follows it.
    document = prompts.document_layout(before.tokenizer, by_chat, None)(prompt, "<think>\nhm\n</think>\n4")
    assert document.prompt == f"<user>{prompt.text}\n<assistant>"
    assert document.completion == "<think>\nhm\n</think>\n4"
    # One that keeps it is used as it is.
    before.tokenizer.chat_template = TEMPLATE
    document = prompts.document_layout(before.tokenizer, by_chat, None)(prompt, "<think>\nhm\n</think>\n4")
    assert document.messages[-1] == {"role": "assistant", "content": "<think>\nhm\n</think>\n4"}


def test_a_student_with_another_tokenizer_learns_the_text(
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


def test_the_text_can_be_written_alone(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, limbeck_home: Path, questions: Path
) -> None:
    done = limbeck("data", write_recipe(tiny_llama, extra=GENERATE), *sets(*ASK), "--format", "json")
    assert done.code == 0, done.err
    text = json.loads(done.out)
    assert text["train_documents"] + text["heldout_documents"] == 12
    assert all(document.prompt for document in corpus.read_corpus(Path(text["train"])))
