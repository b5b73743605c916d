"""Requests of /v1/responses, without HTTP. They become chat requests; the server keeps no answers.

The API is https://platform.openai.com/docs/api-reference/responses. Fields that it does not have are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen

from limbeck.export.server.openai.chat import ChatRequest, ReasoningEffort
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.grammar import JsonObjectFormat, JsonSchema, JsonSchemaFormat, ResponseFormat
from limbeck.export.server.openai.grammar import TextFormat as PlainText
from limbeck.export.server.openai.tools import Function, FunctionName, NamedTool, Tool

JsonObject = dict[str, Any]


@dataclass(kw_only=True)
class FunctionTool:
    """A tool. Only functions are supported."""

    type: Literal["function"]
    name: Annotated[str, MinLen(1), MaxLen(256)]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


@dataclass(kw_only=True)
class FunctionChoice:
    """A `tool_choice`: this function must be called."""

    type: Literal["function"]
    name: str


@dataclass(kw_only=True)
class SchemaFormat:
    """An answer that is JSON by a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, MaxLen(256)]
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


@dataclass(kw_only=True)
class TextOptions:
    """The form of the answer's text."""

    format: PlainText | JsonObjectFormat | SchemaFormat | None = None


@dataclass(kw_only=True)
class Reasoning:
    """How much the model reasons."""

    effort: ReasoningEffort | None = None


@dataclass(kw_only=True)
class ResponsesRequest:
    """The body of POST /v1/responses. A field that is null has its default."""

    input: str | Annotated[list[JsonObject], MinLen(1)]
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: Annotated[int, Ge(1)] | None = None
    temperature: Annotated[float, Ge(0), Le(2)] | None = None  # default: 1
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None  # default: auto
    parallel_tool_calls: bool | None = None  # default: True
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    previous_response_id: None = None  # this server keeps no answers: send the whole conversation as `input`
    conversation: None = None
    background: Literal[False] | None = None
    # Meant for servers with accounts and records: accepted and ignored.
    store: bool | None = None
    metadata: JsonObject | None = None
    user: str | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def to_chat(self) -> ChatRequest:
        """The chat request with the same answer. Raises APIError."""
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages = messages_of_items(items)
        if self.instructions:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = NamedTool(type="function", function=FunctionName(name=choice.name))  # type: ignore[assignment]
        return ChatRequest(
            messages=messages,
            tools=[_tool(tool) for tool in self.tools] if self.tools else None,
            tool_choice=choice,  # type: ignore[arg-type]
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=_response_format(self.text.format if self.text else None),
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )


def name_own_fields(error: APIError) -> APIError:
    """An error of the chat request, with the names of this API."""
    message = error.message.replace("response_format.json_schema.schema", "text.format.schema")
    message = message.replace(".function.parameters", ".parameters")
    param = {"messages": "input", "response_format": "text", "max_completion_tokens": "max_output_tokens"}
    return APIError(error.status, message, param.get(error.param or "", error.param), error.code)


def messages_of_items(items: Sequence[JsonObject]) -> list[JsonObject]:
    """The messages of a conversation that is given as input items. Raises APIError."""
    messages: list[JsonObject] = []
    for index, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":  # earlier reasoning is not for the model to read
            raise APIError(400, f"input[{index}]: items of type {kind!r} are not supported", "input")
    if not messages:
        raise APIError(400, "input has no message", "input")
    return messages


def _tool(tool: FunctionTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return Tool(type="function", function=function)


def _response_format(given: PlainText | JsonObjectFormat | SchemaFormat | None) -> ResponseFormat | None:
    if not isinstance(given, SchemaFormat):
        return given
    schema = JsonSchema(name=given.name, schema=given.schema, description=given.description, strict=given.strict)
    return JsonSchemaFormat(type="json_schema", json_schema=schema)
