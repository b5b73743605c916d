"""What clients send as messages, and what templates get."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.messages import messages_for_template
from limbeck.export.server.openai.tools import describe_tools, write_calls

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
PARSED = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def converted(*messages: dict[str, Any], source: str = "") -> list[dict[str, Any]]:
    return messages_for_template(messages, source)


def test_content_null_beside_calls_is_an_empty_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "sunny"}]}
    assert converted(call, result) == [
        {"role": "assistant", "content": "", "tool_calls": [PARSED]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny", "name": "f"},
    ]
    assert converted({"role": "assistant", "tool_calls": None}) == [{"role": "assistant", "content": ""}]


def test_arguments_that_are_no_json_stay_a_text() -> None:
    for arguments in ("{", "[" * 10**5, None, {"x": 2}):
        call = {"function": {"name": "f", "arguments": arguments}}
        assert converted({"role": "assistant", "tool_calls": [call]})[0]["tool_calls"] == [call]


def test_developer_is_system_unless_the_template_knows_it() -> None:
    message = {"role": "developer", "content": "x"}
    assert converted(message)[0]["role"] == "system"
    assert converted(message, source="{% if role == 'developer' %}")[0]["role"] == "developer"


def test_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    assert converted({"role": "user", "content": parts})[0]["content"] == "a\nb\nc"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, r"messages\[0\].content\[0\].*'image_url'"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "text only"),
        ({"role": "user", "content": [7]}, r"content\[0\]"),
        ({"role": "user", "content": [{"type": ["text"], "text": "a"}]}, r"content\[0\]"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "text must be a text"),
        ({"role": "user", "content": None}, "content must be"),
        ({"role": "tool", "tool_call_id": "a"}, "content must be"),
        ({"role": "assistant", "tool_calls": {"id": "a"}}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, r"tool_calls\[0\]"),
        ({"content": "x"}, "role must be a text"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_place(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(APIError, match=reason) as refused:
        converted(message)
    assert (refused.value.status, refused.value.param) == (400, "messages")


def test_a_template_without_tools_gets_them_as_text() -> None:
    messages = converted(
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    )
    tool = {"type": "function", "function": {"name": "f"}}
    first, call, result = describe_tools(write_calls(messages), [tool])
    assert first["content"].startswith("Be kind.\n\n")
    assert '\n<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>\n' in first["content"]
    assert call["content"] == '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert (result["role"], result["content"]) == ("user", "<tool_response>\nsunny\n</tool_response>")
    assert describe_tools([{"role": "user", "content": "x"}], [tool])[0]["role"] == "system"
