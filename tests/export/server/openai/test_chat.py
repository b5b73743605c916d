"""/v1/chat/completions through the real `openai` client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from limbeck.export.runtime.runtime import Runtime
from tests.export.chat_artifacts import BOS, CHATML, ArtifactWithTemplate
from tests.export.export_helpers import Served, serving


@pytest.fixture(scope="module")
def served(artifact_with_template: ArtifactWithTemplate) -> Iterator[Served]:
    with serving(artifact_with_template("{{ bos_token }}" + CHATML)) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)


MESSAGES = [{"role": "user", "content": "def f"}]
PROMPT = "<|im_start|>user\ndef f<|im_end|>\n<|im_start|>assistant\n"


def ask(client: openai.OpenAI, messages: Any = MESSAGES, **settings: Any) -> Any:
    return client.chat.completions.create(**{"model": "fp32", "messages": messages, "temperature": 0} | settings)


def test_an_answer_equals_that_of_the_runtime_after_the_template(client: openai.OpenAI, runtime: Runtime) -> None:
    ids = runtime.tokenizer.encode(BOS + PROMPT, add_special_tokens=False).ids
    (expected,) = runtime.generate([ids], max_new_tokens=12)
    for length in (dict(max_tokens=12), dict(max_completion_tokens=12), dict(max_completion_tokens=12, max_tokens=3)):
        answer = ask(client, **length)
        choice = answer.choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
        assert choice.finish_reason == expected.finish_reason
        assert answer.object == "chat.completion"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    parts = [{"role": "user", "content": [{"type": "text", "text": "def f"}]}]
    assert ask(client, parts, max_tokens=12).choices[0].message.content == expected.text


def test_the_default_length_is_the_context(client: openai.OpenAI, runtime: Runtime) -> None:
    answer = ask(client, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == runtime.max_length
    assert answer.choices[0].finish_reason == "length"


def test_a_streamed_answer_equals_the_whole_one(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = dict(
        max_tokens=20, temperature=1.2, seed=3, n=3, logprobs=True, top_logprobs=2, stop=["zz", "the"]
    )
    whole = ask(client, **settings)
    chunks = list(ask(client, **settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert all(part.delta.role is None for part in own[1:])
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
        logprobs = [entry for part in own if part.logprobs for entry in part.logprobs.content]
        assert logprobs == choice.logprobs.content
    assert len({choice.message.content for choice in whole.choices}) == 3


def test_logprobs_equal_those_of_completions(client: openai.OpenAI) -> None:
    choice = ask(client, max_tokens=8, temperature=1.0, seed=5, logprobs=True, top_logprobs=3).choices[0]
    chat = choice.logprobs
    assert b"".join(bytes(entry.bytes) for entry in chat.content).decode(errors="replace") == choice.message.content
    settings: dict[str, Any] = dict(model="fp32", max_tokens=8, temperature=1.0, seed=5)
    reference = client.completions.create(prompt=PROMPT, logprobs=3, **settings).choices[0].logprobs
    assert [entry.token for entry in chat.content] == reference.tokens
    assert [entry.logprob for entry in chat.content] == pytest.approx(reference.token_logprobs, abs=1e-6)
    for entry, top in zip(chat.content, reference.top_logprobs, strict=True):
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == max(top.values())
    assert ask(client, max_tokens=2, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(client, max_tokens=2).choices[0].logprobs is None


def test_the_last_message_can_be_continued(client: openai.OpenAI, runtime: Runtime) -> None:
    turns = [*MESSAGES, {"role": "assistant", "content": "class A"}]
    ids = runtime.tokenizer.encode(BOS + PROMPT + "class A", add_special_tokens=False).ids
    (expected,) = runtime.generate([ids], max_new_tokens=6)
    answer = ask(client, turns, max_tokens=6, extra_body={"continue_final_message": True})
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == len(ids)


def test_parameters_with_neutral_values_are_accepted(client: openai.OpenAI) -> None:
    neutral: dict[str, Any] = dict(
        user="me", store=False, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True,
        response_format={"type": "text"}, modalities=["text"], presence_penalty=0, logit_bias={}, tool_choice="auto",
    )  # fmt: skip
    assert ask(client, max_tokens=3, **neutral).choices == ask(client, max_tokens=3).choices


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        (dict(messages=[]), "messages"),
        (dict(messages="hello"), "messages"),
        (dict(messages=[{"content": "x"}]), "messages"),
        (dict(messages=[{"role": 3, "content": "x"}]), "messages"),
        (dict(messages=[{"role": "user"}]), "messages"),
        (dict(messages=[{"role": "user", "content": {"text": "x"}}]), "messages"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "messages"),
        (dict(messages=[{"role": "user", "content": "spam " * 200}]), "messages"),
        (dict(messages=[{"role": "assistant", "content": None, "tool_calls": [1]}]), "messages"),
        (dict(top_logprobs=3), "top_logprobs"),
        (dict(logprobs=True, top_logprobs=99), "top_logprobs"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_completion_tokens=-3), "max_completion_tokens"),
        (dict(tools="x"), "tools"),
        (dict(tool_choice="required"), "tool_choice"),
        (dict(tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice"),
        (dict(response_format={"type": "xml"}), "response_format"),
        (dict(n=129), "n"),
        (dict(extra_body={"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs"),
        (dict(extra_body={"continue_final_message": True, "add_generation_prompt": True}), "continue_final_message"),
        (dict(extra_body={"repetition_penalty": -1}), "repetition_penalty"),
        (dict(reasoning_effort="a bit"), "reasoning_effort"),
        (dict(extra_body={"stop_token_ids": [10**6]}), None),
    ],
)
def test_a_bad_request_names_its_parameter(client: openai.OpenAI, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **settings)
    assert refused.value.body["param"] == param
    assert refused.value.body["message"]
    assert ask(client, max_tokens=1).choices
