"""Prompt logprobs of a teacher behind a real `limbeck serve`, with a proxy before it that changes answers."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from limbeck.distill.models.alignment import document_spans, token_bytes
from limbeck.distill.recipe import cache_form, load
from limbeck.distill.recipe import schema as recipes
from limbeck.distill.recipe.cache_form import Form
from limbeck.distill.recipe.load import Source
from limbeck.distill.recipe.schema import Teacher
from limbeck.distill.run import prepare
from limbeck.distill.teacher import endpoint
from limbeck.distill.teacher import logprobs as logprobs_module
from limbeck.distill.teacher.answer_cache import AnswerCache
from limbeck.distill.teacher.endpoint import EndpointTeacher
from limbeck.distill.teacher.local import local_capture
from limbeck.distill.teacher.logprobs import PromptLogprobsClient
from limbeck.distill.teacher.signal import chunks_cache
from limbeck.registry.catalog import endpoint as endpoint_module
from limbeck.registry.catalog.model_ref import ResolvedModel, resolve_model
from limbeck.registry.checkpoints.load import load_model
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from tests.distill.conftest import DISTILLED, lines_of_text
from tests.distill.endpoint_helpers import Body, EndpointProxy, endpoint_teacher

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("endpoint_home")


def sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def prepared(path: Path, store: Store, *overrides: str) -> context.Setting:
    return prepare.prepare_setting(load.load_recipe(path, list(overrides)), Source(path, overrides), store)


@pytest.mark.parametrize("by_id", [True, False])
def test_captured_top_k_equals_that_of_the_same_model_here(
    store: Store, proxy: EndpointProxy, tiny_llama: Path, by_id: bool
) -> None:
    """Over blocks with several documents and padding, from a server that names tokens by id or by text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = [lines_of_text(3 + n % 3, n) for n in range(12)]
    blocks = make_blocks([Document(str(n), text) for n, text in enumerate(texts)], tokenizer, 64)
    assert (blocks.segments.max(1) > 1).any()
    form = Form("topk", 5, 300)
    cache = TeacherCache({}, blocks.ids.shape, form)
    indices = np.arange(len(blocks.ids))
    local = local_capture(load_model(tiny_llama), blocks, cache, bf16=False)(indices)
    if not by_id:  # a server that refuses an unknown parameter
        proxy.change = lambda body, answer: answer
        forward = proxy.ask

        def refuse_token_ids(method: str, path: str, body: Body | None, headers: dict[str, str]) -> tuple[int, Any]:
            if body and "return_tokens_as_token_ids" in body:
                return 400, {"error": {"message": "return_tokens_as_token_ids: unexpected"}}
            return forward(method, path, body, headers)

        proxy.ask = refuse_token_ids  # type: ignore[method-assign]
    run = PromptLogprobsClient(endpoint_teacher(proxy, store, tiny_llama), tokenizer).pass_over_blocks(blocks)
    [remote] = run(indices, [cache])
    positions = np.zeros_like(blocks.targets)
    positions[:, :-1] = blocks.targets[:, 1:]  # a position stores the prediction of the next token
    close = np.isclose(local["logprobs"][positions], remote["logprobs"][positions], atol=2e-2)
    assert close.mean() > 0.999
    same = local["ids"][positions] == remote["ids"][positions]
    tied = np.ptp(local["logprobs"][positions], axis=1) == 0  # this model embeds the start token as zeros
    assert same[~tied].mean() > 0.995  # except ties in half precision
    probes = 1
    documents = sum(len(document_slices(numbers)) for numbers in blocks.segments)
    assert len(proxy.posts) == probes + -(-documents // logprobs_module.MAX_PROMPTS_PER_REQUEST)
    assert logprobs_module.tokens_sent(blocks)[0] == sum(
        len(p) for body in proxy.posts[probes:] for p in body["prompt"]
    )
    # The answers are stored, so that a lost cache costs no new requests.
    [again] = PromptLogprobsClient(endpoint_teacher(proxy, store, tiny_llama), tokenizer).pass_over_blocks(blocks)(
        indices, [cache]
    )
    assert len(proxy.posts) == probes + -(-documents // logprobs_module.MAX_PROMPTS_PER_REQUEST)
    assert (again["ids"] == remote["ids"]).all()


def test_log_probabilities_of_a_text_by_the_servers_tokenizer(
    store: Store, proxy: EndpointProxy, tiny_llama: Path
) -> None:
    texts = ["def add(a, b):\n    return a + b\n", "The quick brown caf\u00e9 \u2014 \u00c0 bient\u00f4t!", "x"]
    results = dict(PromptLogprobsClient(endpoint_teacher(proxy, store, None)).token_logprobs(texts))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    for number, text in enumerate(texts):
        tokens, logprobs = results[number]
        assert "".join(tokens) == text
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert len(tokens) == ids.shape[1]
        with torch.no_grad():
            wanted = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert np.isnan(logprobs[0])
        assert logprobs[1:] == pytest.approx(wanted.tolist(), abs=1e-3)


def without_logprobs(body: Body, answer: Body) -> Body:
    return answer | {"choices": [choice | {"logprobs": None} for choice in answer["choices"]]}


def without_prompt_logprobs(body: Body, answer: Body) -> Body:
    """As llama.cpp: log-probabilities of the completion only."""
    for choice in answer["choices"]:
        choice["logprobs"] = {name: values[-1:] for name, values in choice["logprobs"].items()}
    return answer


def with_two_top_tokens(body: Body, answer: Body) -> Body:
    for choice in answer["choices"]:
        tops = choice["logprobs"]["top_logprobs"]
        choice["logprobs"]["top_logprobs"] = [dict(list(top.items())[:2]) if top else top for top in tops]
    return answer


def with_other_tokens(body: Body, answer: Body) -> Body:
    for choice in answer["choices"]:
        choice["logprobs"]["tokens"] = choice["logprobs"]["tokens"][::-1]
    return answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_logprobs, "returns no prompt logprobs"),
        (without_prompt_logprobs, "returns no prompt logprobs"),
        (with_two_top_tokens, "was asked for the 5 most likely tokens at each position and returned only 2"),
        (with_other_tokens, "has another tokenizer"),
    ],
)
def test_one_short_request_finds_out_what_a_server_does_not_support(
    store: Store,
    limbeck: Limbeck,
    write_recipe: WriteRecipe,
    proxy: EndpointProxy,
    tiny_llama: Path,
    change: Callable[[Body, Body], Body],
    message: str,
) -> None:
    proxy.change = change
    recipe = write_recipe(proxy.url, objectives=DISTILLED)
    done = limbeck("distill", recipe, *sets(f"teacher.tokenizer={tiny_llama}", "cache.top_k=5"))
    assert done.code == 2
    assert message in done.err
    assert all(body["prompt"] in ([p], p) for body in proxy.posts for p in body["prompt"][:1])
    assert len(proxy.posts) <= 2


def test_a_student_learns_from_an_endpoints_top_tokens(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, proxy: EndpointProxy, tiny_llama: Path
) -> None:
    recipe = write_recipe(proxy.url, objectives=DISTILLED)
    args = sets(f"teacher.tokenizer={tiny_llama}", "cache.top_k=20", "data.max_tokens=640")
    done = limbeck("distill", recipe, *args, *sets("teacher.usd_per_million_input_tokens=1000"), "--format", "json")
    assert done.code == 0, done.err
    [student] = json.loads(done.out)
    teacher = store.get("tiny/1")
    assert (teacher.kind, teacher.engine, teacher.params) == ("teacher", "endpoint", None)
    assert student["parent"] == student["teacher"] == "tiny/1"
    asked = len(proxy.posts)
    making = store.runs.training_cost(store.get("tiny/2"))
    assert making
    sent = sum(len(prompt) for body in proxy.posts[1:] for prompt in body["prompt"])
    assert making.api_input_tokens == sent
    assert making.api_usd == pytest.approx(sent * 1e-3)
    # Another student sends no requests.
    done = limbeck("distill", recipe, *args, *sets("training.max_steps=2"))
    assert (done.code, len(proxy.posts)) == (0, asked)
    # The registered teacher is the endpoint, with the tokenizer.
    found = resolve_model("tiny/1", store)
    assert found.endpoint
    assert (found.endpoint.url, found.has_tokenizer) == (proxy.url, True)
    shown = limbeck("models", "show", "tiny/1")
    assert found.endpoint.label in shown.out
    assert "limbeck export" not in shown.out
    assert (
        AutoTokenizer.from_pretrained(found.path).get_vocab() == AutoTokenizer.from_pretrained(tiny_llama).get_vocab()
    )
    too_many = limbeck("distill", recipe, *sets(f"teacher.tokenizer={tiny_llama}", "cache.top_k=32"))
    assert too_many.code == 2
    assert "lower cache.top_k" in too_many.err


def test_a_student_with_another_tokenizer_learns_from_an_endpoints_log_probabilities(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, proxy: EndpointProxy, tiny_llama: Path
) -> None:
    chunks = '[objectives.across]\ndivergence = "chunks"\n'
    recipe = write_recipe(proxy.url, objectives=chunks, extra="[tokenizer]\nvocab_size = 270\n")
    done = limbeck("distill", recipe, *sets("data.max_tokens=640"))
    assert done.code == 0, done.err
    student = store.get("tiny/2")
    assert len(AutoTokenizer.from_pretrained(store.artifacts.verified_folder(student))) == 270
    asked = len(proxy.posts)
    assert asked > 0
    assert all(isinstance(prompt, str) for body in proxy.posts for prompt in body["prompt"])
    # A chunk stores the sum over the server's tokens, from the second token of the text.
    setting = prepared(recipe, store, "data.max_tokens=640")
    rows = chunks_cache(setting).load_batch(np.arange(len(setting.train.ids)))
    assert (rows["chunks"] > 0).float().mean() > 0.8
    texts, checked = token_bytes(setting.tokenizer), 0
    model, theirs = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    for places, ends, span in document_spans(setting.train, 0, setting.tokenizer, texts):
        ids = theirs(span.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        sums = {}  # bytes up to a token's end -> the teacher's log-probability of the text after its first token
        for count in range(1, ids.shape[1] + 1):
            sums[len(theirs.decode(ids[0, :count]).encode())] = float(logprobs[: count - 1].sum())
        before = None
        for place, end in zip(range(places.start, places.stop), ends - span.skipped, strict=True):
            stored_here = float(rows["logprobs"][0, place - 1]) if place else 0.0
            if stored_here and before is not None:
                assert stored_here == pytest.approx(sums[int(end)] - sums[before], abs=0.02)
                checked += 1
            before = int(end) if int(end) in sums else before
    assert checked > 10
    again = limbeck("distill", recipe, *sets("data.max_tokens=640", "seed=1"))
    assert (again.code, len(proxy.posts)) == (0, asked)


def test_a_block_beyond_the_servers_context_is_bad_input(store: Store, proxy: EndpointProxy, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    blocks = make_blocks([Document("", lines_of_text(40))], tokenizer, 64)
    found = endpoint.resolve_endpoint(Teacher(model=proxy.url), Path(), store)
    assert found.endpoint
    narrow = ResolvedModel(
        found.path, "", "", None, "endpoint", endpoint_module.Endpoint(proxy.url, found.endpoint.name, context=64)
    )
    with pytest.raises(BadInput, match="a context of 64 tokens and a block takes 65"):
        PromptLogprobsClient(
            EndpointTeacher(narrow, Teacher(model=proxy.url), AnswerCache()), tokenizer
        ).pass_over_blocks(blocks)
    assert cache_form.reason_form_unfit("topk", recipes.Objective(divergence="forward_kl"), endpoint=True) is None
