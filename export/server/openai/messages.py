"""Messages of a conversation, from what clients send to what chat templates take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from limbeck.export.server.openai.errors import APIError

JsonObject = dict[str, Any]
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type -> key


def messages_for_template(messages: Sequence[JsonObject], source: str) -> list[JsonObject]:
    """Check the messages and convert them: content as a text, arguments of tool calls as objects.

    Args:
        messages: as the client sent them.
        source: of the chat template, which shows whether it knows the role `developer`.

    Raises:
        APIError: a message is invalid, or not a text.
    """
    names: dict[str, str] = {}  # id of a call -> name of its function
    converted = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise _refusal(f"{place}: role must be a text")
        calls = _calls(message, place)
        names |= {str(call.get("id")): str(call["function"].get("name")) for call in calls}
        result = {key: value for key, value in message.items() if key != "tool_calls"}
        result["content"] = _text_of_content(message.get("content"), role, place)
        if role == "developer" and "developer" not in source:
            result["role"] = "system"
        if role == "tool" and str(message.get("tool_call_id")) in names:
            result = {"name": names[str(message["tool_call_id"])]} | result
        if isinstance(message.get("reasoning"), str):  # the name that some clients have for it
            result = {"reasoning_content": message["reasoning"]} | result
        converted.append(result | ({"tool_calls": calls} if calls else {}))
    return converted


def _text_of_content(content: Any, role: str, place: str) -> str:
    """The text of a message's content. An assistant's may be null: it called tools. Raises APIError."""
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise _refusal(f"{place}: content must be a text or a list of parts of type 'text'")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        key = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        if key is None:
            raise _refusal(f"{place}.content[{index}]: this model reads text only; the part is of type {kind!r}")
        if not isinstance(part.get(key), str):
            raise _refusal(f"{place}.content[{index}]: {key} must be a text")
        texts.append(part[key])
    return "\n".join(texts)  # as vLLM


def _calls(message: JsonObject, place: str) -> list[JsonObject]:
    """A message's tool calls, with their arguments as objects. Raises APIError."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _refusal(f"{place}: tool_calls must be a list of objects")
    for index, call in enumerate(calls):
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise _refusal(f"{place}.tool_calls[{index}]: it must be an object with a function")
    return [_parse_arguments(call) for call in calls]


def _parse_arguments(call: JsonObject) -> JsonObject:
    """Parse a call's arguments: OpenAI's clients send them as JSON in a text, templates expect an object."""
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        return {**call, "function": {**call["function"], "arguments": json.loads(arguments or "{}")}}
    except (ValueError, RecursionError):
        return call


def _refusal(message: str) -> APIError:
    return APIError(400, message, "messages")
