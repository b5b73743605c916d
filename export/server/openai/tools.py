"""Tools: how a request describes them, and how a model writes its calls.

A model's format is read from its chat template, since nothing else in a checkpoint names it.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import uuid4

from annotated_types import MaxLen, MinLen

JsonObject = dict[str, Any]


@dataclass(kw_only=True)
class Function:
    """A function that the model may call."""

    name: Annotated[str, MinLen(1), MaxLen(256)]
    description: str | None = None
    parameters: JsonObject | None = None  # a JSON schema; default: no parameters
    strict: bool | None = None  # refuse a schema of which a part cannot be enforced


@dataclass(kw_only=True)
class Tool:
    """A tool. Only functions are supported."""

    type: Literal["function"]
    function: Function

    def to_template(self) -> JsonObject:
        """What chat templates get: as the client wrote it, without `strict`."""
        given = {"description": self.function.description, "parameters": self.function.parameters}
        function = {"name": self.function.name} | {key: value for key, value in given.items() if value is not None}
        return {"type": "function", "function": function}


@dataclass(kw_only=True)
class FunctionName:
    """The function of a `tool_choice`."""

    name: str


@dataclass(kw_only=True)
class NamedTool:
    """A `tool_choice`: this function must be called."""

    type: Literal["function"]
    function: FunctionName


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes its calls."""

    opener: str  # before a call or a list of calls; "": the answer consists of the calls
    closer: str = ""  # after a call or a list of calls
    separator: str = "\n"  # between two calls
    arguments: str = "arguments"  # the key of a call's arguments
    is_list: bool = False  # the calls are one JSON array
    name_first: str | None = None  # a call is its name, this text and its arguments, not a JSON object
    short_ids: bool = False  # the template accepts only ids of 9 letters and digits

    def new_id(self) -> str:
        """A new id of a call."""
        if self.short_ids:
            return "".join(random.choices(string.ascii_letters + string.digits, k=9))
        return f"call_{uuid4().hex[:24]}"

    def markers(self) -> list[str]:
        """The texts that may be special tokens."""
        return [text for text in (self.opener, self.closer.strip(), self.name_first) if text]


HERMES = ToolFormat("<tool_call>", "</tool_call>")  # NousResearch's Hermes, Qwen and many others
MISTRAL = ToolFormat("[TOOL_CALLS]", separator=", ", is_list=True, short_ids=True)
MISTRAL_NAME_FIRST = ToolFormat("[TOOL_CALLS]", separator="", name_first="[ARGS]", short_ids=True)
LLAMA = ToolFormat("", separator="; ", arguments="parameters")  # Llama 3.1 and later
PYTHON_TAG = "<|python_tag|>"  # Llama 3.1 may write it before its calls


def format_of_template(source: str) -> ToolFormat:
    """The format in which the model of a chat template writes its calls; Hermes' if the template shows none."""
    if "[TOOL_CALLS]" in source:
        return MISTRAL_NAME_FIRST if "[ARGS]" in source else MISTRAL
    if "<tool_call>" not in source and (PYTHON_TAG in source or '"parameters": dictionary' in source):
        return LLAMA
    return HERMES


def describe_tools(messages: Sequence[JsonObject], tools: Sequence[JsonObject]) -> list[JsonObject]:
    """Describe the tools in the system message, in Hermes' words, for a template that does not know tools."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        "You may call one or more functions to assist with the user query.\n\n"
        f"The functions are described within <tools></tools>:\n<tools>\n{lines}\n</tools>\n\n"
        "For each call, return a JSON object with the function's name and arguments within <tool_call></tool_call>:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>'
    )
    first = messages[0]
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def write_calls(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """Write calls and their results into the contents, in Hermes' format, for a template that does not know tools."""
    written = []
    for message in messages:
        content, role = message.get("content") or "", message["role"]
        calls = [call["function"] for call in message.get("tool_calls") or [] if isinstance(call.get("function"), dict)]
        for function in calls:
            call = {"name": function.get("name"), "arguments": function.get("arguments")}
            content += f"\n<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        written.append({**message, "role": role, "content": content.lstrip("\n") if calls else content})
    return written
