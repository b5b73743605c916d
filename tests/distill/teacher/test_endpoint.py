"""Text and prices of a teacher behind a real `limbeck serve`, with a proxy before it that fails on request."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.distill import context
from limbeck.distill.recipe import load
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Teacher
from limbeck.distill.run import prepare
from limbeck.distill.teacher import endpoint, generate
from limbeck.registry.core.errors import BadInput, Unreachable
from limbeck.registry.mlflow.store import Store
from tests.distill.conftest import DISTILLED
from tests.distill.endpoint_helpers import Body, EndpointProxy, endpoint_teacher
from tests.distill.teacher.conftest import KEY

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]

GENERATE = "[generate]\nmax_new_tokens = 6\ntemperature = 0\nchat = false\n[generate.filter]\nfinished = false\n"
ASK = ["data.path=questions.jsonl", "data.prompt_column=question"]
pytestmark = pytest.mark.usefixtures("endpoint_home")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {n} + {n}?"}) + "\n" for n in range(12)))
    return path


def sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def prepared(path: Path, store: Store, *overrides: str) -> context.Setting:
    return prepare.prepare_setting(load.load_recipe(path, list(overrides)), Source(path, overrides), store)


def test_its_text_equals_that_of_the_same_model_here(
    store: Store, write_recipe: WriteRecipe, proxy: EndpointProxy, tiny_llama: Path, questions: Path
) -> None:
    overrides = [*ASK, f"teacher.tokenizer={tiny_llama}", "data.prompt_column=question"]
    text, facts = generate.generate_text(prepared(write_recipe(proxy.url, extra=GENERATE), store, *overrides))
    assert (facts.prompts, facts.kept_answers, facts.new_answers) == (12, 12, 12)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    rows = [json.loads(line) for line in text.train.read_text().splitlines()]
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert row["text"] == row["prompt"] + tokenizer.decode(wanted, skip_special_tokens=True)
    # The token counts of the server: six for every answer.
    assert facts.input_tokens == sum(len(tokenizer(f"What is {n} + {n}?")["input_ids"]) for n in range(12))
    assert facts.output_tokens == facts.tokens == 72


def test_no_answer_is_paid_twice(
    store: Store,
    write_recipe: WriteRecipe,
    proxy: EndpointProxy,
    tiny_llama: Path,
    questions: Path,
    endpoint_home: Path,
) -> None:
    recipe = write_recipe(proxy.url, extra=GENERATE)
    more = [*ASK, f"teacher.tokenizer={tiny_llama}", "generate.samples=2", "generate.temperature=1.0"]
    text, facts = generate.generate_text(prepared(recipe, store, *more))
    assert len(proxy.posts) == facts.new_answers == 24
    assert len({body["seed"] for body in proxy.posts}) == 24
    again, facts = generate.generate_text(prepared(recipe, store, *more))
    assert (again.digest, facts.new_answers, len(proxy.posts)) == (text.digest, 0, 24)
    # Only a damaged answer is requested again.
    with sqlite3.connect(endpoint_home / "completions.db") as file:
        [[request]] = file.execute("SELECT request FROM completions LIMIT 1").fetchall()
        file.execute("UPDATE completions SET answer = substr(answer, 1, 20) WHERE request = ?", [request])
    again, facts = generate.generate_text(prepared(recipe, store, *more))
    assert (again.digest, facts.new_answers, len(proxy.posts)) == (text.digest, 1, 25)
    # The API key is stored nowhere.
    assert not [path for path in endpoint_home.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_transient_errors_are_retried_and_answers_survive_others(
    store: Store, write_recipe: WriteRecipe, proxy: EndpointProxy, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(proxy.url, extra=GENERATE)
    more = [*ASK, f"teacher.tokenizer={tiny_llama}", "teacher.num_concurrent=2"]
    proxy.script = ["429:0", "500", "drop", "503", "ok", "429:0"]
    text, _ = generate.generate_text(prepared(recipe, store, *more, "generate.max_prompts=6"))
    assert len(proxy.posts) == 6
    proxy.script = ["ok", "ok", *["500"] * 50]
    with pytest.raises(Unreachable, match="not now"):
        generate.generate_text(prepared(recipe, store, *more))
    assert len(proxy.posts) == 8
    proxy.script = []
    whole, facts = generate.generate_text(prepared(recipe, store, *more))
    assert (facts.new_answers, len(proxy.posts)) == (4, 12)
    assert whole.digest != text.digest


def test_requests_are_concurrent_and_within_the_rate_limit(
    store: Store, write_recipe: WriteRecipe, proxy: EndpointProxy, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(proxy.url, extra=GENERATE)
    tokenizer = f"teacher.tokenizer={tiny_llama}"
    proxy.hold = 0.05
    generate.generate_text(prepared(recipe, store, *ASK, tokenizer, "teacher.num_concurrent=3"))
    assert proxy.max_running == 3
    proxy.times.clear()
    few = ["generate.max_prompts=6", "generate.max_new_tokens=5", "teacher.requests_per_minute=1200"]
    limited = prepared(recipe, store, *ASK, tokenizer, *few)
    start = time.monotonic()
    generate.generate_text(limited)
    assert len(proxy.times) == 6
    assert max(proxy.times) - start >= 5 * 60 / 1200  # the sixth waits for five intervals, however slow the machine is


def test_chat_with_a_system_prompt_reasoning_and_log_probabilities(
    store: Store, write_recipe: WriteRecipe, proxy: EndpointProxy, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(proxy.url, extra=GENERATE.replace("chat = false\n", ""))
    more = [*ASK, f"teacher.tokenizer={tiny_llama}", "generate.chat=true", 'generate.system_prompt="Be brief."']
    before = prepared(recipe, store, *more)
    with pytest.raises(BadInput, match="has no chat template"):
        generate.generate_text(before)
    # The template of an endpoint without a tokenizer is unknown: it is assumed to have one.
    before = before._replace(teacher=endpoint.resolve_endpoint(Teacher(model=proxy.url), Path(), store))

    def add_reasoning(body: Body, answer: Body) -> Body:
        answer["choices"][0]["message"]["reasoning_content"] = "hm\n"
        return answer

    proxy.change = add_reasoning
    text, _ = generate.generate_text(before)
    body = proxy.posts[0]
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    assert "logprobs" not in body
    rows = [json.loads(line) for line in text.train.read_text().splitlines()]
    assert all("<think>\nhm\n</think>\n\n" in row["text"] for row in rows)

    proxy.change = lambda body, answer: answer
    strict = before._replace(
        recipe=load.load_recipe(recipe, [*more, "generate.filter.min_logprob=-20", "generate.max_new_tokens=5"])
    )
    _, facts = generate.generate_text(strict)
    assert facts.kept_answers + facts.dropped["min_tokens"] == 12  # some are only spaces
    assert proxy.posts[-1]["logprobs"] is True
    asked = len(proxy.posts)
    proxy.change = lambda body, answer: {**answer, "choices": [{**answer["choices"][0], "logprobs": None}]}
    blind = before._replace(
        recipe=load.load_recipe(recipe, [*more, "generate.filter.min_logprob=-20", 'generate.system_prompt="Say."'])
    )
    with pytest.raises(BadInput, match="returns no log-probabilities, which generate"):
        generate.generate_text(blind)
    assert len(proxy.posts) == asked + 1  # only one token was paid
    assert proxy.posts[-1]["max_tokens"] == 1


def test_a_server_that_requires_max_completion_tokens(
    store: Store, proxy: EndpointProxy, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = endpoint_teacher(proxy, store, tiny_llama, num_concurrent=1)
    asked: list[Body] = []

    def ask(path: str, body: Body) -> Body:
        asked.append(body)
        if "max_tokens" in body:
            raise BadInput("400 Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return {"usage": {}}

    monkeypatch.setattr(teacher.client, "request_json", ask)
    requests = [teacher.request("/chat/completions", {"max_tokens": 5, "n": n}) for n in (1, 2)]
    assert len(list(teacher.ask_all(requests, lambda answer: answer))) == 2
    assert [sorted(body.keys() - {"model", "n"}) for body in asked] == [["max_tokens"]] + [
        ["max_completion_tokens"]
    ] * 2


def test_dollars_are_counted_and_limit_the_requests(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, proxy: EndpointProxy, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(proxy.url, extra=GENERATE)
    prices = ["teacher.usd_per_million_input_tokens=1000", "teacher.usd_per_million_output_tokens=100000"]
    more = [*ASK, f"teacher.tokenizer={tiny_llama}", "teacher.num_concurrent=1", *prices]
    expected = generate.forecast_generation(prepared(recipe, store, *more))
    assert (expected.prompts, expected.missing, expected.output_tokens) == (12, 12, 72)
    assert proxy.posts == []
    done = limbeck("distill", recipe, *sets(*more, "budget.max_usd=5", "budget.usd_per_hour=1"))
    assert done.code == 0, done.err
    # An answer costs six tokens at ten cents, and its question a tenth of a cent per token; the text may cost $4.
    asked = len(proxy.posts)
    assert 6 <= asked <= 8
    assert f"{asked} written now, $4." in done.err
    assert f"80% of budget.max_usd is spent, {12 - asked} answers were not requested" in done.err
    assert "tiny/2" in done.out
    # The money stays spent: the same command sends no more requests, and uses the same text.
    again = limbeck("distill", recipe, *sets(*more, "budget.max_usd=5", "budget.usd_per_hour=1"))
    assert "already made, tiny/2" in again.err
    assert len(proxy.posts) == asked
    making = store.runs.training_cost(store.get("tiny/2"))
    assert making
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sent = sum(len(tokenizer(body["prompt"])["input_ids"]) for body in proxy.posts)
    assert (making.api_input_tokens, making.api_output_tokens) == (sent, 6 * asked)
    assert making.api_usd == pytest.approx(sent * 1e-3 + 6 * asked * 0.1)
    metrics = store.client.get_run(store.get("tiny/2").run_id).data.metrics
    assert metrics["teacher_usd"] == metrics["generate.usd"] == pytest.approx(making.api_usd)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("http://127.0.0.1:9/v1", [], "cannot be used"),
        ("{url}#another", [], "does not serve 'another'"),
        ("{url}", [], "is an endpoint and has no files"),
        ("{url}", ["teacher.tokenizer=text.txt"], "text.txt"),
        (
            "{url}",
            ["teacher.tokenizer={llama}", "cache.form=online"],
            "an endpoint returns only its most likely tokens",
        ),
        ("{url}", ["teacher.tokenizer={llama}", "objectives.distilled.temperature=2.0"], "temperature 2"),
    ],
)
@pytest.mark.usefixtures("store")
def test_bad_endpoint_settings_are_reported_before_any_request(
    limbeck: Limbeck,
    write_recipe: WriteRecipe,
    proxy: EndpointProxy,
    tiny_llama: Path,
    model: str,
    changes: list[str],
    message: str,
) -> None:
    recipe = write_recipe(model.format(url=proxy.url), objectives=DISTILLED)
    done = limbeck("distill", recipe, *sets(*(change.format(llama=tiny_llama) for change in changes)))
    assert done.code == 2
    assert message in done.err
    assert "recipe.toml" in done.err
    assert proxy.posts == []


def test_refused_requests_are_skipped(
    store: Store, write_recipe: WriteRecipe, proxy: EndpointProxy, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(proxy.url, extra=GENERATE)
    more = [*ASK, f"teacher.tokenizer={tiny_llama}", "teacher.num_concurrent=1"]
    before = prepared(recipe, store, *more)
    proxy.script = ["400", "400", "ok", "400"]
    _, facts = generate.generate_text(before)
    assert (facts.answers, facts.new_answers, len(proxy.posts)) == (9, 9, 9)
    _, facts = generate.generate_text(before)  # they are sent again
    assert (facts.answers, facts.new_answers, len(proxy.posts)) == (12, 3, 12)
    # A server that refuses everything gets few requests.
    proxy.script = ["400"] * 100
    with pytest.raises(BadInput, match="refuses the request: 400 not now"):
        generate.generate_text(prepared(recipe, store, *more, "generate.max_new_tokens=5"))
    assert len(proxy.script) == 100 - endpoint.MAX_REFUSALS
    proxy.script = ["400"] * 100
    with pytest.raises(BadInput, match="every request was refused, such as"):
        generate.generate_text(prepared(recipe, store, *more, "generate.max_new_tokens=4", "generate.max_prompts=3"))
    proxy.script = ["401"]
    with pytest.raises(BadInput, match="refuses the API key"):
        generate.generate_text(prepared(recipe, store, *more, "generate.max_new_tokens=3", "generate.max_prompts=1"))


def test_two_runs_with_the_same_requests_pay_once(store: Store, proxy: EndpointProxy) -> None:
    """Each has its own database connection and file locks, as in two processes."""
    proxy.hold = 0.05
    payloads = [{"prompt": f"def f{n}(", "max_tokens": 2, "temperature": 0} for n in range(6)]

    def ask(order: int) -> list[Any]:
        teacher = endpoint_teacher(proxy, store, None, num_concurrent=3)
        requests = [teacher.request("/completions", payload) for payload in payloads]
        found = dict(teacher.ask_all(requests[::order], lambda answer: answer["choices"][0]["text"]))
        return [found[number] for number in range(6)][::order]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, (1, -1))
    assert first == second
    assert len(proxy.posts) == 6
