"""/v1/responses through the real `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.responses import messages_of_items
from tests.export.chat_artifacts import CHATML, copy_with_template
from tests.export.export_helpers import serving

TEMPLATE = CHATML + "{% if reasoning_effort == 'high' %}{{ '<think>' }}{% endif %}"
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rom", "Bern"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": WEATHER}]


@pytest.fixture(scope="module")
def client(boundless: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("responses") / "fp32"
    with serving(copy_with_template(boundless, boundless.parent / "torch", folder, TEMPLATE)) as running:
        yield openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, given: Any = "def f", **settings: Any) -> Any:
    return client.responses.create(
        **{"model": "fp32", "input": given, "temperature": 0, "max_output_tokens": 12} | settings
    )


def chat(client: openai.OpenAI, messages: Any, **settings: Any) -> Any:
    answer = client.chat.completions.create(model="fp32", messages=messages, temperature=0, max_tokens=12, **settings)
    return answer.choices[0].message


def test_an_answer_is_that_of_chat(client: openai.OpenAI) -> None:
    user: Any = {"role": "user", "content": "def f"}
    system: Any = {"role": "system", "content": "Be kind."}
    answer = ask(client)
    assert answer.output_text == chat(client, [user]).content
    assert (answer.object, answer.status, answer.incomplete_details.reason) == (
        "response",
        "incomplete",
        "max_output_tokens",
    )
    assert answer.usage.output_tokens == 12
    assert answer.usage.total_tokens == answer.usage.input_tokens + 12
    assert answer.store is False
    assert ask(client, instructions="Be kind.").output_text == chat(client, [system, user]).content
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "def f"}]}]
    assert ask(client, [system, *parts]).output_text == chat(client, [system, user]).content


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(max_output_tokens=None, tools=TOOLS, tool_choice="required", parallel_tool_calls=False),
        dict(reasoning={"effort": "high"}),
        dict(temperature=1.5, text={"format": {"type": "json_object"}}),
    ],
)
def test_the_events_of_a_stream_give_the_answer(client: openai.OpenAI, settings: dict[str, Any]) -> None:
    events = list(ask(client, stream=True, **settings))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    assert events[-1].type == f"response.{final.status}"
    for index, item in enumerate(final.output):
        own = [event for event in events if getattr(event, "output_index", None) == index]
        assert (own[0].type, own[-1].type) == ("response.output_item.added", "response.output_item.done")
        assert own[-1].item == item
        text = item.arguments if item.type == "function_call" else item.content[0].text
        assert "".join(event.delta for event in own if event.type.endswith(".delta")) == text
        done = next(event for event in own if event.type.endswith(("text.done", "arguments.done")))
        assert text == (done.arguments if item.type == "function_call" else done.text)
    if not settings.get("temperature"):
        whole = ask(client, **settings)
        assert [(item.type, item.status) for item in whole.output] == [
            (item.type, item.status) for item in final.output
        ]
        assert whole.output_text == final.output_text
        assert whole.usage.output_tokens == final.usage.output_tokens


def test_calls_and_their_results(client: openai.OpenAI) -> None:
    first = ask(client, tools=TOOLS, tool_choice={"type": "function", "name": "weather"}, max_output_tokens=300)
    (call,) = first.output
    assert (call.type, call.name, call.status, first.status) == (
        "function_call",
        "weather",
        "completed",
        "completed",
    )
    assert json.loads(call.arguments)["city"] in ("Rom", "Bern")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items = [{"role": "user", "content": "def f"}, call.model_dump(exclude_none=True), result]
    assert ask(client, items, tools=TOOLS, tool_choice="none").output_text


def test_an_answer_follows_its_schema(client: openai.OpenAI) -> None:
    class City(pydantic.BaseModel):
        city: Literal["Rom", "Bern"]

    answer = client.responses.parse(model="fp32", input="def f", temperature=0, text_format=City, max_output_tokens=300)
    assert isinstance(answer.output_parsed, City)


def test_reasoning_is_an_item_of_its_own(client: openai.OpenAI) -> None:
    (item,) = ask(client, reasoning={"effort": "high"}).output
    assert item.type == "reasoning"
    assert item.content[0].text


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        (dict(previous_response_id="resp_1"), "previous_response_id"),
        (dict(background=True), "background"),
        (dict(tools=[{"type": "web_search"}]), "tools"),
        (dict(tool_choice="required"), "tool_choice"),
        (dict(given=[]), "input"),
        (dict(given=[{"type": "item_reference", "id": "x"}]), "input"),
        (dict(given=[{"role": "user", "content": [{"type": "input_image"}]}]), "input"),
        (dict(max_output_tokens=0), "max_output_tokens"),
        (dict(text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "foo"}}}), "text"),
    ],
)
def test_a_bad_request_names_its_parameter(client: openai.OpenAI, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **settings)
    body: Any = refused.value.body
    assert body["param"] == param


def test_items_become_messages() -> None:
    calls = [
        {"type": "function_call", "call_id": name, "name": name, "arguments": "{}", "id": "fc_1"} for name in ("f", "g")
    ]
    user = {"role": "user", "content": "x"}
    reasoning = {"type": "reasoning", "summary": []}
    result = {"type": "function_call_output", "call_id": "f", "output": "ok"}
    asked, called, told = messages_of_items([{"type": "message", **user}, reasoning, *calls, result])
    assert asked == user
    assert [call["function"]["name"] for call in called["tool_calls"]] == ["f", "g"]
    assert told == {"role": "tool", "tool_call_id": "f", "content": "ok"}
    with pytest.raises(APIError, match="no message"):
        messages_of_items([reasoning])
