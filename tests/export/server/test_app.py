"""`limbeck serve` in a process without torch, through the real `openai` client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import log_softmax
from tests.export.export_helpers import Exported, Served, serving

KEY = "k3y-of-the-test"


@pytest.fixture(scope="module")
def served(llama: Exported) -> Iterator[Served]:
    with serving(llama.fp32, KEY) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key=KEY, max_retries=0, timeout=60)


def complete(client: openai.OpenAI, prompt: Any = "def add(", **settings: Any) -> Any:
    return client.completions.create(**{"model": "fp32", "prompt": prompt, "temperature": 0} | settings)


def test_models_and_health(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == ["fp32"]
    assert httpx.get(served.url.replace("/v1", "/health")).json() == {"status": "ok"}


def test_a_completion_equals_that_of_the_runtime(client: openai.OpenAI, runtime: Runtime) -> None:
    answer = complete(client, max_tokens=12)
    (expected,) = runtime.generate(["def add("], max_new_tokens=12)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 12, 17)
    assert answer.object == "text_completion"


def test_the_default_is_16_tokens_at_temperature_1(client: openai.OpenAI) -> None:
    answers = {client.completions.create(model="fp32", prompt="def", seed=s).choices[0].text for s in range(3)}
    assert len(answers) == 3
    assert client.completions.create(model="fp32", prompt="x", max_tokens=None).usage.completion_tokens <= 16


def test_a_prompt_is_a_text_token_ids_or_a_list_of_them(client: openai.OpenAI, runtime: Runtime) -> None:
    texts = ["class A", "for i in"]
    ids = [runtime.encode(text) for text in texts]
    expected = [completion.text for completion in runtime.generate(texts, max_new_tokens=8)]
    for prompt, wanted in [(texts, expected), (ids, expected), (ids[0], expected[:1]), (texts[1], expected[1:])]:
        answer = complete(client, prompt, max_tokens=8)
        assert [choice.text for choice in answer.choices] == wanted
        assert [choice.index for choice in answer.choices] == list(range(len(wanted)))


@pytest.mark.parametrize(
    "settings",
    [dict(max_tokens=20), dict(max_tokens=20, temperature=1.3, seed=4, top_p=0.9, n=3, logprobs=2, echo=True)],
)
def test_a_streamed_answer_equals_the_whole_one(client: openai.OpenAI, settings: dict[str, Any]) -> None:
    whole = complete(client, **settings)
    chunks = list(complete(client, **settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert len(own) > 5
        assert "".join(part.text for part in own) == choice.text
        assert [part.finish_reason for part in own][-1] == choice.finish_reason
        if choice.logprobs:
            assert [p for part in own for p in part.logprobs.token_logprobs] == choice.logprobs.token_logprobs
            assert [p for part in own for p in part.logprobs.tokens] == choice.logprobs.tokens


def test_n_choices_differ_and_a_seed_reproduces_them(client: openai.OpenAI) -> None:
    settings = dict(n=4, temperature=1.0, seed=9, max_tokens=10)
    first, again = complete(client, **settings), complete(client, **settings)
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 4
    assert [choice.text for choice in again.choices] == texts
    assert complete(client, **settings | {"seed": 10}).choices[0].text != texts[0]
    # The draws depend on the row only: two prompts with two choices each give the same four texts.
    both = complete(client, ["def add(", "def add("], **settings | {"n": 2})
    assert [choice.text for choice in both.choices] == texts


def test_a_stop_string_ends_the_text(client: openai.OpenAI) -> None:
    settings = dict(max_tokens=30, temperature=1.0, seed=2)
    text = complete(client, **settings).choices[0].text
    stop = text[6:9]
    for given in (stop, ["never this", stop]):
        choice = complete(client, **settings, stop=given).choices[0]
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"


def test_echo_gives_prompt_logprobs(client: openai.OpenAI, runtime: Runtime) -> None:
    """The request of lm-eval's local-completions for loglikelihoods: token ids, one new token, echo and logprobs."""
    ids = runtime.encode("class Vessel:\n    def __init__(self):")
    logits = runtime.logits(np.array([ids]), np.ones((1, len(ids)), np.int64))[0]
    expected = log_softmax(logits.astype(np.float64))
    for length in (0, 1):
        (choice,) = complete(client, ids, max_tokens=length, echo=True, logprobs=1).choices
        scores = choice.logprobs
        assert len(scores.tokens) == len(scores.text_offset) == len(ids) + length
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        assert scores.token_logprobs[1 : len(ids)] == pytest.approx(
            [expected[place, token] for place, token in enumerate(ids[1:])], abs=1e-4
        )
        for place, top in enumerate(scores.top_logprobs[1 : len(ids)]):
            assert max(top.values()) == pytest.approx(expected[place].max(), abs=1e-4)
        assert "".join(scores.tokens[: len(ids)]) == runtime.decode(ids)
        assert choice.text.startswith(runtime.decode(ids))
        offsets = zip(scores.text_offset, scores.tokens[: len(ids)], strict=False)
        assert all(choice.text[start:].startswith(token) for start, token in offsets)


def test_tokens_are_named_by_id_on_request(client: openai.OpenAI, runtime: Runtime) -> None:
    ids = runtime.encode("caf\u00e9 \u2014 x")  # some tokens are incomplete characters
    settings: dict[str, Any] = dict(max_tokens=3, echo=True, logprobs=2)
    plain = complete(client, ids, **settings).choices[0]
    named = complete(client, ids, **settings, extra_body={"return_tokens_as_token_ids": True}).choices[0]
    assert named.text == plain.text
    assert [int(token.removeprefix("token_id:")) for token in named.logprobs.tokens[: len(ids)]] == ids
    assert named.logprobs.token_logprobs == plain.logprobs.token_logprobs
    for token, value, top in zip(
        named.logprobs.tokens[1:], named.logprobs.token_logprobs[1:], named.logprobs.top_logprobs[1:], strict=True
    ):
        assert top[token] == value
        assert all(name.startswith("token_id:") for name in top)


def test_logprobs_contain_the_chosen_token_and_the_most_likely_ones(client: openai.OpenAI) -> None:
    scores = complete(client, max_tokens=10, temperature=1.5, seed=1, logprobs=3).choices[0].logprobs
    for token, logprob, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True):
        assert top[token] == logprob
        assert len(top) in (3, 4)
    assert complete(client, max_tokens=2, logprobs=0).choices[0].logprobs.top_logprobs == [None, None]
    assert complete(client, max_tokens=2).choices[0].logprobs is None


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        (dict(temperature=-0.5), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(max_tokens=-1), "max_tokens"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens="many"), "max_tokens"),
        (dict(n=0), "n"),
        (dict(n=10**9), "n"),
        (dict(prompt=["x"] * 100, n=100), "prompt"),
        (dict(prompt=[]), "prompt"),
        (dict(prompt=[[]]), "prompt"),
        (dict(prompt={"text": "x"}), "prompt"),
        (dict(prompt=[300]), "prompt"),
        (dict(prompt="spam " * 100), "prompt"),
        (dict(stop=[""]), "stop"),
        (dict(stop=["x"] * 1000), "stop"),
        (dict(logprobs=1000), "logprobs"),
        (dict(seed=-1), "seed"),
        (dict(suffix="x"), "suffix"),
        (dict(presence_penalty=2.5), "presence_penalty"),
        (dict(logit_bias={"5": 101}), "logit_bias"),
        (dict(logit_bias={"the": 1}), "logit_bias"),
        (dict(logit_bias={"-1": 1}), "logit_bias"),
        (dict(best_of=5), "best_of"),
        (dict(extra_body={"min_tokens": 17}), None),
    ],
)
def test_a_bad_request_names_its_parameter(client: openai.OpenAI, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, **settings)
    assert refused.value.body["param"] == param
    assert refused.value.body["type"] == "invalid_request_error"
    assert refused.value.body["message"]


def test_parameters_with_neutral_values_are_accepted(client: openai.OpenAI) -> None:
    neutral = dict(
        presence_penalty=0, frequency_penalty=0.0, logit_bias={}, best_of=1, user="me", suffix=None, stop=None
    )
    assert complete(client, **neutral, max_tokens=3).choices[0].text == complete(client, max_tokens=3).choices[0].text


def test_unknown_fields_are_ignored_and_reported_once(llama: Exported) -> None:
    with serving(llama.fp32) as running:
        asking = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)
        plain = complete(asking, max_tokens=3)
        for _ in range(2):
            extra = {"tempurature": 0, "prompts": 1, "to_sampling": None}  # the last two are names in the code
            assert complete(asking, max_tokens=3, extra_body=extra).choices == plain.choices
        running.process.terminate()
        _, errors = running.process.communicate(timeout=20)
    assert sorted(errors.splitlines()) == [
        f"WARNING: /v1/completions: the field {name!r} is not supported, and ignored"
        for name in ("prompts", "tempurature", "to_sampling")
    ]


def test_biases_and_penalties_equal_those_of_the_runtime(client: openai.OpenAI, runtime: Runtime) -> None:
    standard: dict[str, Any] = dict(presence_penalty=1.5, frequency_penalty=-0.5, logit_bias={"40": 3.5, "41": -100})
    extra: dict[str, Any] = dict(min_p=0.02, repetition_penalty=1.4)
    settings = dict(temperature=1.2, seed=5, max_tokens=12)
    answer = complete(client, **settings, **standard, extra_body=extra).choices[0].text
    bias = {int(token): value for token, value in standard.pop("logit_bias").items()}
    (expected,) = runtime.generate(
        ["def add("], temperature=1.2, seed=5, max_new_tokens=12, **standard, **extra, logit_bias=bias
    )
    assert answer == expected.text
    assert answer != complete(client, **settings).choices[0].text
    with pytest.raises(openai.BadRequestError, match="logit_bias names token 70000"):
        complete(client, logit_bias={"70000": 1})


def test_usage_reports_prompt_tokens_from_the_prefix_cache(client: openai.OpenAI) -> None:
    prompt = list(range(40, 80))
    cached = [complete(client, prompt, n=3, max_tokens=1).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    assert cached[0] == 0
    assert 32 <= cached[1] < 40  # the last one is always computed, for its logits


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here") as refused:
        complete(client, model="gpt-9")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("body", [b"{nope", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 10**5, b"", b"7"])
def test_an_invalid_body_is_a_bad_request(served: Served, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{served.url}/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_a_body_beyond_the_limit_is_refused(served: Served) -> None:
    def parts() -> Iterator[bytes]:  # chunked: the size is unknown in advance
        for _ in range(5):
            yield b" " * 2**20

    answer = httpx.post(f"{served.url}/completions", content=parts(), headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", KEY[:-1], "k\u00e9y"])
def test_a_wrong_key_is_refused_and_the_key_is_not_in_the_answer(served: Served, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    for answer in (
        httpx.get(f"{served.url}/models", headers=headers),
        httpx.post(f"{served.url}/completions", content=b"{nope", headers=headers),
    ):
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in answer.text


def test_unknown_paths_and_methods_have_the_same_error_format(served: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{served.url}/nothing", headers=headers).json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{served.url}/completions", headers=headers).status_code == 405


def test_a_model_without_a_chat_template_refuses_chat(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template") as refused:
        client.chat.completions.create(model="fp32", messages=[{"role": "user", "content": "x"}])
    assert refused.value.code == "no_chat_template"
