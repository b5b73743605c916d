"""JSON answers, tool calls and embeddings of SmolLM2 through the real `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import openai
import pydantic
import pytest

from tests.export.export_helpers import serving


@pytest.fixture(scope="module")
def client(artifacts: Path) -> Iterator[openai.OpenAI]:
    with serving(artifacts / "int8-weight", "", "--embeddings", "mean") as served:
        yield openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=240)


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=40)
    born: int = pydantic.Field(ge=0, le=2100)
    fields: list[Annotated[str, pydantic.Field(max_length=40)]] = pydantic.Field(min_length=1, max_length=3)


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_answers_always_parse(client: openai.OpenAI, temperature: float) -> None:
    for person in ("Marie Curie", "a famous mathematician"):
        answer = client.chat.completions.parse(
            model="int8-weight",
            messages=[{"role": "user", "content": f"Describe {person} as JSON."}],
            response_format=Person,
            temperature=temperature,
            seed=1,
            n=2 if temperature else 1,
            max_tokens=300,
        )
        assert all(isinstance(choice.message.parsed, Person) for choice in answer.choices)


def test_a_required_call_is_valid_and_streams(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(
        model="int8-weight",
        messages=[{"role": "user", "content": "What is the weather in Paris, in Celsius?"}],
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=200,
    )
    (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris", "unit": "C"}
    parts = [part for chunk in client.chat.completions.create(**asked, stream=True) for part in chunk.choices]
    streamed = "".join(call.function.arguments for part in parts for call in part.delta.tool_calls or [])
    assert streamed == call.function.arguments
    assert parts[-1].finish_reason == "tool_calls"


def test_embeddings_tell_what_texts_are_about(client: openai.OpenAI) -> None:
    texts = ["The cat sat on the mat.", "A kitten is lying on a rug.", "Interest rates rose by half a point."]
    vectors = np.array([item.embedding for item in client.embeddings.create(model="int8-weight", input=texts).data])
    similar, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert similar > other
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
