"""JSON answers and tool calls of a running server, through the real `openai` client."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from limbeck.export.server.openai.answers.parser import join_calls
from limbeck.export.server.openai.answers.tool_calls import CallPart
from tests.export.chat_artifacts import CHATML, copy_with_template
from tests.export.export_helpers import serving

THINKS = CHATML + "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\\n' }}{% endif %}"
WITH_TOOLS = "{{ tools | tojson }}{{ '<tool_call>' }}" + CHATML
MESSAGES = [{"role": "user", "content": "def f"}]


@contextmanager
def serving_template(artifact: Path, template: str) -> Iterator[openai.OpenAI]:
    """A client of a server whose model has this template."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(copy_with_template(artifact, artifact.parent / "torch", Path(folder) / "fp32", template)) as running,
    ):
        yield openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(boundless: Path) -> Iterator[openai.OpenAI]:
    with serving_template(boundless, CHATML) as client:
        yield client


def ask(client: openai.OpenAI, messages: Any = MESSAGES, **settings: Any) -> Any:
    return client.chat.completions.create(**{"model": "fp32", "messages": messages, "temperature": 0} | settings)


class City(pydantic.BaseModel):
    name: Literal["Rom", "Bern"]
    hot: bool
    sights: list[Literal["tower", "bridge"]] = pydantic.Field(min_length=1, max_length=2)


def function(name: str, strict: bool | None = None, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


TOOLS = [function("weather", city={"enum": ["Rom", "Bern"]}, days={"enum": [1, 2]}), function("stop")]


@pytest.mark.parametrize(
    "settings", [dict(seed=1), dict(temperature=1.5, seed=3, n=4), dict(frequency_penalty=2, top_p=0.5, seed=2)]
)
def test_an_answer_follows_its_schema(client: openai.OpenAI, settings: dict[str, Any]) -> None:
    asked: dict[str, Any] = dict(model="fp32", messages=MESSAGES, response_format=City, max_tokens=200)
    answer = client.chat.completions.parse(**asked, **settings)
    assert all(isinstance(choice.message.parsed, City) for choice in answer.choices)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    with client.chat.completions.stream(**asked, **settings) as stream:
        final = stream.get_final_completion()
    assert all(isinstance(choice.message.parsed, City) for choice in final.choices)


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = dict(response_format={"type": "json_object"}, logit_bias={"93": 9}, max_tokens=300)
    answer = ask(client, **settings, logprobs=True, top_logprobs=2, stop=["never"])
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    assert answer.choices[0].message.content.startswith("{")
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("settings", [{}, dict(temperature=1.5, seed=1, n=3)])
def test_a_required_call_is_valid(client: openai.OpenAI, tool_choice: Any, settings: dict[str, Any]) -> None:
    asked: dict[str, Any] = dict(tools=TOOLS, tool_choice=tool_choice, parallel_tool_calls=False, max_tokens=200)
    whole = ask(client, **asked, **settings)
    chunks = list(ask(client, **asked, **settings, stream=True))
    for choice in whole.choices:
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert call.function.name in ("weather", "stop")[: None if tool_choice == "required" else 1]
        arguments = json.loads(call.function.arguments)
        assert arguments.keys() == ({"city", "days"} if call.function.name == "weather" else set())
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        parts = [part for each in own for part in each.delta.tool_calls or []]
        assert parts[0].id
        assert [part.id for part in parts[1:]] == [None] * len(parts[1:])
        (streamed,) = join_calls(
            CallPart(part.index, part.id or "", part.function.name or "", part.function.arguments) for part in parts
        )
        assert (streamed.name, streamed.arguments) == (call.function.name, call.function.arguments)
        assert own[-1].finish_reason == "tool_calls"
        assert not any(each.delta.content for each in own)


def test_several_calls_unless_refused(client: openai.OpenAI) -> None:
    more = {"logit_bias": {str(client_token): 30 for client_token in (198, 10, 11)}}
    answer = ask(client, tools=TOOLS[1:], tool_choice="required", max_tokens=400, **more)
    ids = [call.id for call in answer.choices[0].message.tool_calls]
    assert 1 <= len(ids) == len(set(ids)) <= 16


def test_auto_may_answer_with_text(client: openai.OpenAI) -> None:
    answer = ask(client, tools=TOOLS, max_tokens=12)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "length"
    assert ask(client, tools=TOOLS, tool_choice="none", max_tokens=6).choices == ask(client, max_tokens=6).choices


def test_tools_are_described_if_the_template_does_not_know_them(client: openai.OpenAI, boundless: Path) -> None:
    plain, told = (ask(client, tools=tools, max_tokens=1).usage.prompt_tokens for tools in (None, TOOLS))
    assert told > plain + 400
    with serving_template(boundless, WITH_TOOLS) as knowing:
        assert plain < ask(knowing, tools=TOOLS, max_tokens=1).usage.prompt_tokens < told
        call = ask(knowing, tools=TOOLS, tool_choice="required", max_tokens=200).choices[0].message.tool_calls[0]
        assert call.function.name in ("weather", "stop")


def test_reasoning_is_split_from_the_answer(boundless: Path) -> None:
    schema: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["ab", "cd"]}}}
    with serving_template(boundless, THINKS) as client:
        answer = ask(client, max_tokens=20).choices[0]
        assert answer.message.reasoning_content
        assert answer.message.content == ""
        chunks = list(ask(client, max_tokens=20, stream=True))
        streamed = [getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks]
        assert "".join(streamed) == answer.message.reasoning_content
        off = ask(client, max_tokens=40, response_format=schema, reasoning_effort="none").choices[0].message
        assert json.loads(off.content) in ("ab", "cd")
        assert not hasattr(off, "reasoning_content")
        on = ask(client, max_tokens=9, response_format=schema).choices[0].message
        assert on.reasoning_content


def test_clients_messages_are_accepted(client: openai.OpenAI) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "w?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    ]
    as_system = [{**messages[0], "role": "system"}, *messages[1:]]
    answers = [ask(client, given, max_tokens=4) for given in (messages, as_system)]
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def test_a_constrained_answer_leaves_others_as_they_are(client: openai.OpenAI) -> None:
    alone = ask(client, max_tokens=30).choices
    asked: dict[str, Any] = dict(response_format={"type": "json_object"}, max_tokens=30, temperature=1)
    with ThreadPoolExecutor(6) as pool:
        constrained = [pool.submit(ask, client, **asked, seed=seed) for seed in range(4)]
        free = [pool.submit(ask, client, max_tokens=30) for _ in range(2)]
        assert all(done.result().choices[0].message.content.startswith("{") for done in constrained)
        assert all(done.result().choices == alone for done in free)


def json_schema(schema: Any, strict: bool | None = None) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}


@pytest.mark.parametrize(
    ("settings", "param", "place"),
    [
        (dict(response_format=json_schema({"type": "foo"})), "response_format", "response_format.json_schema.schema: "),
        (
            dict(response_format=json_schema({"properties": {"a": {"not": {}}}}, strict=True)),
            "response_format",
            "response_format.json_schema.schema.properties.a: ",
        ),
        (
            dict(tools=[TOOLS[1], function("f", a={"pattern": "("})], tool_choice="required"),
            "tools",
            "tools[1].function.parameters.properties.a: ",
        ),
        (dict(tools=[function("f", strict=True, a={"type": "foo"})]), "tools", "tools[0].function.parameters"),
        (dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice", "tool_choice"),
        (dict(tools=[], tool_choice="required"), "tool_choice", "tool_choice"),
        (dict(tools=[{"type": "function"}]), "tools", "tools"),
        (dict(response_format={"type": "json_schema"}), "response_format", "response_format"),
    ],
)
def test_a_bad_schema_names_its_place(client: openai.OpenAI, settings: dict[str, Any], param: str, place: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **settings)
    body: Any = refused.value.body
    assert body["param"] == param
    assert body["message"].startswith(place)


def test_a_tool_without_strict_and_with_a_bad_schema_is_offered_all_the_same(client: openai.OpenAI) -> None:
    assert ask(client, tools=[function("f", a={"pattern": "("})], max_tokens=2).choices[0].message.content


def test_what_ends_an_answer(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=8, logprobs=True, extra_body={"return_tokens_as_token_ids": True}).choices[0]
    ids = [int(entry.token.removeprefix("token_id:")) for entry in whole.logprobs.content]
    stopped = ask(client, max_tokens=8, extra_body={"stop_token_ids": [ids[4]]})
    assert stopped.usage.completion_tokens == ids.index(ids[4]) + 1
    assert stopped.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="min_tokens"):
        ask(client, max_tokens=8, extra_body={"min_tokens": 9})
