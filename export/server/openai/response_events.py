"""Answers of /v1/responses: the output items, and the events of their stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from limbeck.export.server.openai.completions import Delta, Usage
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.responses import ResponsesRequest

JsonObject = dict[str, Any]
# type of an item -> prefix of its id, name of its text's events, field of their text, type of its content part
ITEMS = {
    "message": ("msg", "response.output_text", "text", "output_text"),
    "reasoning": ("rs", "response.reasoning_text", "text", "reasoning_text"),
    "function_call": ("fc", "response.function_call_arguments", "arguments", ""),
}


class ResponseWriter:
    """Writes one answer: its events while it is generated, and the whole of it.

    Args:
        body: the request.
        model: the name of the served model.
        usage: counted by the caller.
    """

    def __init__(self, body: ResponsesRequest, model: str, usage: Usage) -> None:
        self._body, self._usage = body, usage
        self._output: list[JsonObject] = []
        self._sequence = 0
        self._reasoning_tokens = 0
        self._head = {"id": f"resp_{uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": model}

    def start(self) -> Iterator[JsonObject]:
        """The events before the first token."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response("in_progress"))

    def add(self, delta: Delta) -> Iterator[JsonObject]:
        """The events of a delta."""
        if delta.part.reasoning:
            self._reasoning_tokens += delta.new_tokens
            yield from self._write("reasoning", delta.part.reasoning)
        if delta.part.text:
            yield from self._write("message", delta.part.text)
        for call in delta.part.calls:
            if call.id:
                yield from self._begin("function_call", call_id=call.id, name=call.name, arguments="")
            if call.arguments:
                yield from self._write("function_call", call.arguments)

    def finish(self, finish_reason: str | None) -> Iterator[JsonObject]:
        """The events after the last token."""
        if not self._output:
            yield from self._write("message", "")
        is_complete = finish_reason != "length"
        yield from self._end_item("completed" if is_complete else "incomplete")
        status = "completed" if is_complete else "incomplete"
        yield self._event(f"response.{status}", response=self.response(status))

    def fail(self, error: APIError) -> JsonObject:
        """The event of an error within the stream."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def response(self, status: str) -> JsonObject:
        """The whole answer so far."""
        body = self._body
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "output": self._output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": asdict(body.text.format) if body.text and body.text.format else {"type": "text"}},
            "tool_choice": _choice_json(body),
            "tools": [asdict(tool) for tool in body.tools or []],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage_json(),
        }

    def _write(self, kind: str, text: str) -> Iterator[JsonObject]:
        """Append text to the open item, or to a new one if that is of another type."""
        if not self._output or self._output[-1]["type"] != kind:
            content = {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
            yield from self._begin(kind, **content)
        item = self._output[-1]
        _, event, field, _ = ITEMS[kind]
        holder = item if kind == "function_call" else item["content"][0]
        holder[field] += text
        yield self._event(f"{event}.delta", delta=text, **self._place(item), **_no_logprobs(kind))

    def _begin(self, kind: str, **fields: Any) -> Iterator[JsonObject]:
        """End the open item and begin a new one."""
        yield from self._end_item("completed")
        prefix, _, _, part_type = ITEMS[kind]
        item = {"id": f"{prefix}_{uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=_copy(item))
        if part_type:
            part: JsonObject = {"type": part_type, "text": ""} | (
                {"annotations": [], "logprobs": []} if kind == "message" else {}
            )
            item["content"].append(part)
            yield self._event("response.content_part.added", part=dict(part), **self._place(item))

    def _end_item(self, status: str) -> Iterator[JsonObject]:
        """End the open item, if there is one."""
        item = self._output[-1] if self._output else None
        if item is None or item["status"] != "in_progress":
            return
        kind = item["type"]
        _, event, field, part_type = ITEMS[kind]
        holder = item["content"][0] if part_type else item
        yield self._event(f"{event}.done", **{field: holder[field]}, **self._place(item), **_no_logprobs(kind))
        if part_type:
            yield self._event("response.content_part.done", part=dict(holder), **self._place(item))
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=_copy(item))

    def _place(self, item: JsonObject) -> JsonObject:
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        return place if item["type"] == "function_call" else place | {"content_index": 0}

    def _event(self, kind: str, **fields: Any) -> JsonObject:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **fields}

    def _usage_json(self) -> JsonObject:
        usage = self._usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _copy(item: JsonObject) -> JsonObject:
    """An item as it is now: later text changes only its content."""
    return {key: list(value) if isinstance(value, list) else value for key, value in item.items()}


def _no_logprobs(kind: str) -> JsonObject:
    return {"logprobs": []} if kind == "message" else {}


def _choice_json(body: ResponsesRequest) -> Any:
    choice = body.tool_choice or "auto"
    return choice if isinstance(choice, str) else asdict(choice)
