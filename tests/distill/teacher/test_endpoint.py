"""Teachers by endpoint: a real `limbeck serve` in another process, and a server before it that fails."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.distill import context
from limbeck.distill.cache.teacher_cache import TeacherCache
from limbeck.distill.data.blocks import document_slices, make_blocks
from limbeck.distill.data.document import Document
from limbeck.distill.models import loading
from limbeck.distill.models.alignment import document_spans, token_bytes
from limbeck.distill.recipe import cache_form, load
from limbeck.distill.recipe import schema as recipes
from limbeck.distill.recipe.cache_form import Form
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Teacher
from limbeck.distill.run import prepare
from limbeck.distill.teacher import endpoint, generate
from limbeck.distill.teacher import logprobs as echo
from limbeck.distill.teacher.answer_cache import AnswerCache
from limbeck.distill.teacher.endpoint import EndpointTeacher
from limbeck.distill.teacher.local import local_capture
from limbeck.distill.teacher.logprobs import PromptLogprobsClient
from limbeck.distill.teacher.signal import chunks_cache
from limbeck.registry.catalog import endpoint as endpoint_module
from limbeck.registry.catalog.model_ref import ResolvedModel, resolve_model
from limbeck.registry.core.errors import BadInput, Unreachable
from limbeck.registry.mlflow.store import Store
from tests.distill.conftest import DISTILLED, lines_of_text
from tests.distill.endpoint_helpers import Body, Front
from tests.export.export_helpers import Served, serving

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]

KEY = "k3y-of-the-test"
GENERATE = "[generate]\nmax_new_tokens = 6\ntemperature = 0\nchat = false\n[generate.filter]\nfinished = false\n"
ASK = ["data.path=questions.jsonl", "data.prompt_column=question"]


@pytest.fixture(scope="module")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`limbeck serve` of tiny_llama's ONNX artifact; it wants the key."""
    from limbeck.export.artifact.export import export_onnx

    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    export_onnx(tiny_llama, folder, "fp32")
    with serving(folder, KEY) as server:
        yield server


@pytest.fixture
def front(served: Served) -> Iterator[Front]:
    server = Front(served.url)
    yield server
    server.shutdown()


@pytest.fixture(autouse=True)
def home(limbeck_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint_module, "BACKOFF_S", 0.01)
    return limbeck_home


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {n} + {n}?"}) + "\n" for n in range(12)))
    return path


def sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def prepared(path: Path, store: Store, *overrides: str) -> context.Setting:
    return prepare.prepare_setting(load.load_recipe(path, list(overrides)), Source(path, overrides), store)


def teacher_of(front: Front, store: Store, tokenizer: Path | None, **settings: Any) -> EndpointTeacher:
    asked = Teacher(model=front.url, tokenizer=str(tokenizer) if tokenizer else None, **settings)
    return EndpointTeacher(endpoint.resolve_endpoint(asked, Path(), store), asked, AnswerCache())


# --- text that it writes


def test_its_text_is_what_the_same_model_writes_here(
    store: Store, write_recipe: WriteRecipe, front: Front, tiny_llama: Path, questions: Path
) -> None:
    overrides = [*ASK, f"teacher.tokenizer={tiny_llama}", "data.prompt_column=question"]
    there, facts = generate.generate_text(prepared(write_recipe(front.url, extra=GENERATE), store, *overrides))
    assert (facts.prompts, facts.kept_answers, facts.new_answers) == (12, 12, 12)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    rows = [json.loads(line) for line in there.train.read_text().splitlines()]
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert row["text"] == row["prompt"] + tokenizer.decode(wanted, skip_special_tokens=True)
    # As the server counts: every question has so many tokens, every answer six.
    assert facts.input_tokens == sum(len(tokenizer(f"What is {n} + {n}?")["input_ids"]) for n in range(12))
    assert facts.output_tokens == facts.tokens == 72


def test_nothing_is_paid_twice(
    store: Store, write_recipe: WriteRecipe, front: Front, tiny_llama: Path, questions: Path, home: Path
) -> None:
    recipe = write_recipe(front.url, extra=GENERATE)
    more = [*ASK, f"teacher.tokenizer={tiny_llama}", "generate.samples=2", "generate.temperature=1.0"]
    text, facts = generate.generate_text(prepared(recipe, store, *more))
    assert len(front.posts) == facts.new_answers == 24
    assert len({body["seed"] for body in front.posts}) == 24
    again, facts = generate.generate_text(prepared(recipe, store, *more))
    assert (again.digest, facts.new_answers, len(front.posts)) == (text.digest, 0, 24)
    # What is damaged is asked again, and nothing else.
    with sqlite3.connect(home / "completions.db") as file:
        [[request]] = file.execute("SELECT request FROM completions LIMIT 1").fetchall()
        file.execute("UPDATE completions SET answer = substr(answer, 1, 20) WHERE request = ?", [request])
    again, facts = generate.generate_text(prepared(recipe, store, *more))
    assert (again.digest, facts.new_answers, len(front.posts)) == (text.digest, 1, 25)
    # Neither is the key kept anywhere.
    assert not [path for path in home.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_what_may_pass_is_tried_again_and_what_was_answered_survives_the_rest(
    store: Store, write_recipe: WriteRecipe, front: Front, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(front.url, extra=GENERATE)
    more = [*ASK, f"teacher.tokenizer={tiny_llama}", "teacher.num_concurrent=2"]
    front.script = ["429:0", "500", "drop", "503", "ok", "429:0"]
    text, _ = generate.generate_text(prepared(recipe, store, *more, "generate.max_prompts=6"))
    assert len(front.posts) == 6
    front.script = ["ok", "ok", *["500"] * 50]
    with pytest.raises(Unreachable, match="not now"):
        generate.generate_text(prepared(recipe, store, *more))
    assert len(front.posts) == 8
    front.script = []
    whole, facts = generate.generate_text(prepared(recipe, store, *more))
    assert (facts.new_answers, len(front.posts)) == (4, 12)
    assert whole.digest != text.digest


def test_it_is_asked_concurrently_and_no_faster_than_allowed(
    store: Store, write_recipe: WriteRecipe, front: Front, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(front.url, extra=GENERATE)
    tokenizer = f"teacher.tokenizer={tiny_llama}"
    front.hold = 0.05
    generate.generate_text(prepared(recipe, store, *ASK, tokenizer, "teacher.num_concurrent=3"))
    assert front.most == 3
    front.times.clear()
    few = ["generate.max_prompts=6", "generate.max_new_tokens=5", "teacher.requests_per_minute=1200"]
    generate.generate_text(prepared(recipe, store, *ASK, tokenizer, *few))
    assert max(front.times) - min(front.times) >= 5 * 60 / 1200 - 0.02


def test_chat_with_system_prompt_reasoning_and_log_probabilities(
    store: Store, write_recipe: WriteRecipe, front: Front, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(front.url, extra=GENERATE.replace("chat = false\n", ""))
    more = [*ASK, f"teacher.tokenizer={tiny_llama}", "generate.chat=true", 'generate.system_prompt="Be brief."']
    before = prepared(recipe, store, *more)
    with pytest.raises(BadInput, match="has no chat template"):
        generate.generate_text(before)
    # Its own template is not known: it is trusted to have one.
    before = before._replace(teacher=endpoint.resolve_endpoint(Teacher(model=front.url), Path(), store))

    def thinks(body: Body, answer: Body) -> Body:
        answer["choices"][0]["message"]["reasoning_content"] = "hm\n"
        return answer

    front.change = thinks
    text, _ = generate.generate_text(before)
    body = front.posts[0]
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    assert "logprobs" not in body
    rows = [json.loads(line) for line in text.train.read_text().splitlines()]
    assert all("<think>\nhm\n</think>\n\n" in row["text"] for row in rows)

    front.change = lambda body, answer: answer
    strict = before._replace(
        recipe=load.load_recipe(recipe, [*more, "generate.filter.min_logprob=-20", "generate.max_new_tokens=5"])
    )
    _, facts = generate.generate_text(strict)
    assert facts.kept_answers + facts.dropped["min_tokens"] == 12  # some are nothing but spaces
    assert front.posts[-1]["logprobs"] is True
    asked = len(front.posts)
    front.change = lambda body, answer: {**answer, "choices": [{**answer["choices"][0], "logprobs": None}]}
    blind = before._replace(
        recipe=load.load_recipe(recipe, [*more, "generate.filter.min_logprob=-20", 'generate.system_prompt="Say."'])
    )
    with pytest.raises(BadInput, match="returns no log-probabilities, which generate"):
        generate.generate_text(blind)
    assert len(front.posts) == asked + 1  # one token was paid
    assert front.posts[-1]["max_tokens"] == 1


def test_a_server_that_knows_the_length_by_another_name(
    store: Store, front: Front, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(front, store, tiny_llama, num_concurrent=1)
    asked: list[Body] = []

    def ask(path: str, body: Body) -> Body:
        asked.append(body)
        if "max_tokens" in body:
            raise BadInput("400 Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return {"usage": {}}

    monkeypatch.setattr(teacher.client, "ask", ask)
    requests = [teacher.request("/chat/completions", {"max_tokens": 5, "n": n}) for n in (1, 2)]
    assert len(list(teacher.ask_all(requests, lambda answer: answer))) == 2
    assert [sorted(body.keys() - {"model", "n"}) for body in asked] == [["max_tokens"]] + [
        ["max_completion_tokens"]
    ] * 2


def test_dollars_are_counted_and_end_the_asking(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, front: Front, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(front.url, extra=GENERATE)
    prices = ["teacher.usd_per_million_input_tokens=1000", "teacher.usd_per_million_output_tokens=100000"]
    more = [*ASK, f"teacher.tokenizer={tiny_llama}", "teacher.num_concurrent=1", *prices]
    ahead = generate.forecast_generation(prepared(recipe, store, *more))
    assert (ahead.prompts, ahead.missing, ahead.output_tokens) == (12, 12, 72)
    assert front.posts == []
    done = limbeck("distill", recipe, *sets(*more, "budget.max_usd=5", "budget.usd_per_hour=1"))
    assert done.code == 0, done.err
    # Each answer costs six tokens at ten cents and its question at a tenth of one; four dollars are for the text.
    asked = len(front.posts)
    assert 6 <= asked <= 8
    assert f"{asked} written now, $4." in done.err
    assert f"80% of budget.max_usd is spent, {12 - asked} answers were not requested" in done.err
    assert "tiny/2" in done.out
    # It is spent for good: the same command asks for no more, and learns from the same text.
    again = limbeck("distill", recipe, *sets(*more, "budget.max_usd=5", "budget.usd_per_hour=1"))
    assert "already made, tiny/2" in again.err
    assert len(front.posts) == asked
    making = store.runs.training_cost(store.get("tiny/2"))
    assert making
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sent = sum(len(tokenizer(body["prompt"])["input_ids"]) for body in front.posts)
    assert (making.api_input_tokens, making.api_output_tokens) == (sent, 6 * asked)
    assert making.api_usd == pytest.approx(sent * 1e-3 + 6 * asked * 0.1)
    metrics = store.client.get_run(store.get("tiny/2").run_id).data.metrics
    assert metrics["teacher_usd"] == metrics["generate.usd"] == pytest.approx(making.api_usd)


# --- what it says of a text


@pytest.mark.parametrize("by_id", [True, False])
def test_what_is_captured_is_what_the_model_says_here(
    store: Store, front: Front, tiny_llama: Path, by_id: bool
) -> None:
    """Top-k over blocks that hold several documents and padding, from a server that names tokens by id or by text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = [lines_of_text(3 + n % 3, n) for n in range(12)]
    blocks = make_blocks([Document(str(n), text) for n, text in enumerate(texts)], tokenizer, 64)
    assert (blocks.segments.max(1) > 1).any()
    form = Form("topk", 5, 300)
    cache = TeacherCache({}, blocks.ids.shape, form)
    indices = np.arange(len(blocks.ids))
    here = local_capture(loading.load_model(tiny_llama), blocks, cache, bf16=False)(indices)
    if not by_id:  # such as one that refuses what it does not know
        front.change = lambda body, answer: answer
        forward = front.ask

        def older(method: str, path: str, body: Body | None, headers: dict[str, str]) -> tuple[int, Any]:
            if body and "return_tokens_as_token_ids" in body:
                return 400, {"error": {"message": "return_tokens_as_token_ids: unexpected"}}
            return forward(method, path, body, headers)

        front.ask = older  # type: ignore[method-assign]
    run = PromptLogprobsClient(teacher_of(front, store, tiny_llama), tokenizer).pass_over_blocks(blocks)
    [there] = run(indices, [cache])
    positions = np.zeros_like(blocks.targets)
    positions[:, :-1] = blocks.targets[:, 1:]  # a position tells of the next token
    close = np.isclose(here["logprobs"][positions], there["logprobs"][positions], atol=2e-2)
    assert close.mean() > 0.999
    same = here["ids"][positions] == there["ids"][positions]
    tied = np.ptp(here["logprobs"][positions], axis=1) == 0  # the token that starts a text is zeros in this model
    assert same[~tied].mean() > 0.995  # but for ties in half precision
    probes = 1
    pieces = sum(len(document_slices(numbers)) for numbers in blocks.segments)
    assert len(front.posts) == probes + -(-pieces // echo.MAX_PROMPTS_PER_REQUEST)
    assert echo.tokens_sent(blocks)[0] == sum(len(p) for body in front.posts[probes:] for p in body["prompt"])
    # Asked again it is read from what was kept, whatever becomes of the cache.
    [again] = PromptLogprobsClient(teacher_of(front, store, tiny_llama), tokenizer).pass_over_blocks(blocks)(
        indices, [cache]
    )
    assert len(front.posts) == probes + -(-pieces // echo.MAX_PROMPTS_PER_REQUEST)
    assert (again["ids"] == there["ids"]).all()


def test_the_likelihood_of_a_text_by_the_servers_own_tokenizer(store: Store, front: Front, tiny_llama: Path) -> None:
    texts = ["def add(a, b):\n    return a + b\n", "The quick brown caf\u00e9 \u2014 \u00c0 bient\u00f4t!", "x"]
    found = dict(PromptLogprobsClient(teacher_of(front, store, None)).token_logprobs(texts))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    for number, text in enumerate(texts):
        tokens, logprobs = found[number]
        assert "".join(tokens) == text
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert len(tokens) == ids.shape[1]
        with torch.no_grad():
            wanted = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert np.isnan(logprobs[0])
        assert logprobs[1:] == pytest.approx(wanted.tolist(), abs=1e-3)


def blind(body: Body, answer: Body) -> Body:
    return answer | {"choices": [choice | {"logprobs": None} for choice in answer["choices"]]}


def no_echo(body: Body, answer: Body) -> Body:
    """As llama.cpp: log-probabilities of what is made alone."""
    for choice in answer["choices"]:
        choice["logprobs"] = {name: values[-1:] for name, values in choice["logprobs"].items()}
    return answer


def few(body: Body, answer: Body) -> Body:
    for choice in answer["choices"]:
        tops = choice["logprobs"]["top_logprobs"]
        choice["logprobs"]["top_logprobs"] = [dict(list(top.items())[:2]) if top else top for top in tops]
    return answer


def other_tokens(body: Body, answer: Body) -> Body:
    for choice in answer["choices"]:
        choice["logprobs"]["tokens"] = choice["logprobs"]["tokens"][::-1]
    return answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (blind, "returns no prompt logprobs"),
        (no_echo, "returns no prompt logprobs"),
        (few, "was asked for the 5 most likely tokens at each position and returned only 2"),
        (other_tokens, "has another tokenizer"),
    ],
)
def test_what_a_server_does_not_tell_is_found_out_by_one_short_request(
    store: Store,
    limbeck: Limbeck,
    write_recipe: WriteRecipe,
    front: Front,
    tiny_llama: Path,
    change: Callable[[Body, Body], Body],
    message: str,
) -> None:
    front.change = change
    recipe = write_recipe(front.url, objectives=DISTILLED)
    done = limbeck("distill", recipe, *sets(f"teacher.tokenizer={tiny_llama}", "cache.top_k=5"))
    assert done.code == 2
    assert message in done.err
    assert all(body["prompt"] in ([p], p) for body in front.posts for p in body["prompt"][:1])
    assert len(front.posts) <= 2


def test_students_learn_from_its_likeliest_tokens(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, front: Front, tiny_llama: Path
) -> None:
    recipe = write_recipe(front.url, objectives=DISTILLED)
    args = sets(f"teacher.tokenizer={tiny_llama}", "cache.top_k=20", "data.max_tokens=640")
    done = limbeck("distill", recipe, *args, *sets("teacher.usd_per_million_input_tokens=1000"), "--format", "json")
    assert done.code == 0, done.err
    [student] = json.loads(done.out)
    teacher = store.get("tiny/1")
    assert (teacher.kind, teacher.engine, teacher.params) == ("teacher", "endpoint", None)
    assert student["parent"] == student["teacher"] == "tiny/1"
    asked = len(front.posts)
    making = store.runs.training_cost(store.get("tiny/2"))
    assert making
    sent = sum(len(prompt) for body in front.posts[1:] for prompt in body["prompt"])
    assert making.api_input_tokens == sent
    assert making.api_usd == pytest.approx(sent * 1e-3)
    # Another student asks nothing.
    done = limbeck("distill", recipe, *args, *sets("training.max_steps=2"))
    assert (done.code, len(front.posts)) == (0, asked)
    # The registered teacher is the endpoint, with the tokenizer.
    found = resolve_model("tiny/1", store)
    assert found.endpoint
    assert (found.endpoint.url, found.has_tokenizer) == (front.url, True)
    shown = limbeck("models", "show", "tiny/1")
    assert found.endpoint.label in shown.out
    assert "limbeck export" not in shown.out
    assert (
        AutoTokenizer.from_pretrained(found.path).get_vocab() == AutoTokenizer.from_pretrained(tiny_llama).get_vocab()
    )
    too_many = limbeck("distill", recipe, *sets(f"teacher.tokenizer={tiny_llama}", "cache.top_k=32"))
    assert too_many.code == 2
    assert "lower cache.top_k" in too_many.err


def test_a_student_with_other_tokens_learns_from_its_likelihood_of_the_text(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, front: Front, tiny_llama: Path, home: Path
) -> None:
    chunks = '[objectives.across]\ndivergence = "chunks"\n'
    recipe = write_recipe(front.url, objectives=chunks, extra="[tokenizer]\nvocab_size = 270\n")
    done = limbeck("distill", recipe, *sets("data.max_tokens=640"))
    assert done.code == 0, done.err
    student = store.get("tiny/2")
    assert len(AutoTokenizer.from_pretrained(store.artifacts.verified_folder(student))) == 270
    asked = len(front.posts)
    assert asked > 0
    assert all(isinstance(prompt, str) for body in front.posts for prompt in body["prompt"])
    # What is stored is the sum over the server's tokens of a chunk, told from the text's second token on.
    found = prepared(recipe, store, "data.max_tokens=640")
    rows = chunks_cache(found).load_batch(np.arange(len(found.train.ids)))
    assert (rows["chunks"] > 0).float().mean() > 0.8
    texts, checked = token_bytes(found.tokenizer), 0
    model, theirs = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    for places, ends, piece in document_spans(found.train, 0, found.tokenizer, texts):
        ids = theirs(piece.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            said = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        last = {}  # text up to a chunk's end -> the teacher's log-probability of all after its first token
        for count in range(1, ids.shape[1] + 1):
            last[len(theirs.decode(ids[0, :count]).encode())] = float(said[: count - 1].sum())
        before = None
        for place, end in zip(range(places.start, places.stop), ends - piece.skipped, strict=True):
            stored_here = float(rows["logprobs"][0, place - 1]) if place else 0.0
            if stored_here and before is not None:
                assert stored_here == pytest.approx(last[int(end)] - last[before], abs=0.02)
                checked += 1
            before = int(end) if int(end) in last else before
    assert checked > 10
    again = limbeck("distill", recipe, *sets("data.max_tokens=640", "seed=1"))
    assert (again.code, len(front.posts)) == (0, asked)


# --- bad input


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
def test_what_cannot_be_is_told_before_any_work(
    store: Store,
    limbeck: Limbeck,
    write_recipe: WriteRecipe,
    front: Front,
    tiny_llama: Path,
    model: str,
    changes: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(model.format(url=front.url), objectives=DISTILLED)
    done = limbeck("distill", recipe, *sets(*(change.format(llama=tiny_llama) for change in changes)))
    assert done.code == 2
    assert message in done.err
    assert "recipe.toml" in done.err
    assert front.posts == []


def test_a_block_that_does_not_fit_the_servers_context(store: Store, front: Front, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    blocks = make_blocks([Document("", lines_of_text(40))], tokenizer, 64)
    found = endpoint.resolve_endpoint(Teacher(model=front.url), Path(), store)
    assert found.endpoint
    narrow = ResolvedModel(
        found.path, "", "", None, "endpoint", endpoint_module.Endpoint(front.url, found.endpoint.name, context=64)
    )
    with pytest.raises(BadInput, match="a context of 64 tokens and a block takes 65"):
        PromptLogprobsClient(
            EndpointTeacher(narrow, Teacher(model=front.url), AnswerCache()), tokenizer
        ).pass_over_blocks(blocks)
    assert cache_form.reason_form_unfit("topk", recipes.Objective(divergence="forward_kl"), endpoint=True) is None


def test_a_request_that_is_refused_is_passed_over(
    store: Store, write_recipe: WriteRecipe, front: Front, tiny_llama: Path, questions: Path
) -> None:
    recipe = write_recipe(front.url, extra=GENERATE)
    more = [*ASK, f"teacher.tokenizer={tiny_llama}", "teacher.num_concurrent=1"]
    before = prepared(recipe, store, *more)
    front.script = ["400", "400", "ok", "400"]
    _, facts = generate.generate_text(before)
    assert (facts.answers, facts.new_answers, len(front.posts)) == (9, 9, 9)
    _, facts = generate.generate_text(before)  # they are asked again
    assert (facts.answers, facts.new_answers, len(front.posts)) == (12, 3, 12)
    # A server that refuses everything is not asked for long.
    front.script = ["400"] * 100
    with pytest.raises(BadInput, match="refuses the request: 400 not now"):
        generate.generate_text(prepared(recipe, store, *more, "generate.max_new_tokens=5"))
    assert len(front.script) == 100 - endpoint.MAX_REFUSALS
    front.script = ["400"] * 100
    with pytest.raises(BadInput, match="every request was refused, such as"):
        generate.generate_text(prepared(recipe, store, *more, "generate.max_new_tokens=4", "generate.max_prompts=3"))
    front.script = ["401"]
    with pytest.raises(BadInput, match="refuses the API key"):
        generate.generate_text(prepared(recipe, store, *more, "generate.max_new_tokens=3", "generate.max_prompts=1"))


def test_two_that_want_the_same_pay_once(store: Store, front: Front) -> None:
    """Each with a connection to the file and file locks of its own, as two processes have."""
    front.hold = 0.05
    payloads = [{"prompt": f"def f{n}(", "max_tokens": 2, "temperature": 0} for n in range(6)]

    def ask(order: int) -> list[Any]:
        teacher = teacher_of(front, store, None, num_concurrent=3)
        requests = [teacher.request("/completions", payload) for payload in payloads]
        found = dict(teacher.ask_all(requests[::order], lambda answer: answer["choices"][0]["text"]))
        return [found[number] for number in range(6)][::order]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, (1, -1))
    assert first == second
    assert len(front.posts) == 6
