"""What /v1/chat/completions is asked and what it answers, without the HTTP around it.

The API is that of https://platform.openai.com/docs/api-reference/chat. Tools are shown to the model where its template
knows them; the calls it writes are not parsed but left in the answer's text.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from limbeck.export.runtime.chat_template import ChatTemplate
from limbeck.export.runtime.detokenize import REPLACEMENT_CHARACTER
from limbeck.export.runtime.generation import TokenEvent
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.server.completions import (
    APIError,
    Delta,
    GenerationRequest,
    delta_of_event,
    encode,
    encode_prompt,
    token_name,
)
from limbeck.export.server.scheduler import Scheduler
from limbeck.registry.core.errors import BadInput

JsonObject = dict[str, Any]


@dataclass(kw_only=True)
class Conversation:
    """Messages, and how the template makes a prompt of them."""

    messages: Annotated[list[JsonObject], MinLen(1)]
    tools: list[JsonObject] | None = None
    documents: list[JsonObject] | None = None  # as in vLLM, and so the three below
    add_generation_prompt: bool | None = None  # True, unless the last message is continued
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None

    def render(self, template: ChatTemplate | None) -> str:
        """What the model reads. Raises APIError."""
        if template is None:
            raise APIError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        goes_on = bool(self.continue_final_message)
        opens = not goes_on if self.add_generation_prompt is None else self.add_generation_prompt
        if goes_on and opens:
            message = "a last message that is continued is followed by no new one: set add_generation_prompt to false"
            raise APIError(400, message, "continue_final_message")
        settings = self.chat_template_kwargs or {}
        taken = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "range"}
        if refused := sorted(taken & settings.keys()):
            raise APIError(400, f"{refused[0]} is no setting of the template", "chat_template_kwargs")
        messages = [_message(place, message) for place, message in enumerate(self.messages)]
        try:
            return template.render(
                messages,
                tools=self.tools or None,
                documents=self.documents,
                add_generation_prompt=opens,
                continue_final_message=goes_on,
                **settings,
            )
        except BadInput as error:
            raise APIError(400, error.message, "messages") from None


@dataclass(kw_only=True)
class ResponseFormat:
    """Only plain text is given."""

    type: Literal["text"]


@dataclass(kw_only=True)
class ChatRequest(Conversation, GenerationRequest):
    """The body of POST /v1/chat/completions."""

    __pydantic_config__ = {"extra": "forbid"}

    max_completion_tokens: Annotated[int, Ge(1)] | None = None  # what the context leaves
    max_tokens: Annotated[int, Ge(1)] | None = None  # its older name
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Ge(0), Le(20)] | None = None
    # Accepted where they change nothing.
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    def prompt_ids(self, runtime: Runtime, template: ChatTemplate | None) -> list[int]:
        """Token ids of the prompt. Raises APIError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs is given without logprobs", "top_logprobs")
        if self.tool_choice == "none":
            self.tools = None
        # The template writes the special tokens: none is added.
        ids = encode(runtime, self.render(template), False, "messages")
        return encode_prompt(runtime, ids, 1, "messages")

    def max_new_tokens(self, scheduler: Scheduler, prompt: list[int]) -> int:
        """The most new tokens of a choice."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        if self.max_tokens is not None:
            return self.max_tokens
        room = scheduler.runtime.max_length - len(prompt)
        return min(room, scheduler.limits.new_tokens or room)


class ChatFormatter:
    """How an answer of /v1/chat/completions is written."""

    id_prefix, object_type, chunk_object_type = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_chunk(self, index: int) -> JsonObject | None:
        """What a streamed choice begins with."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, delta: Delta) -> JsonObject:
        """A piece of a streamed choice."""
        content = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        return {
            "index": delta.index,
            "delta": content,
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
        }

    def choice(self, delta: Delta) -> JsonObject:
        """A choice that is not streamed."""
        message = {"role": "assistant", "content": delta.text}
        return {
            "index": delta.index,
            "message": message,
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
        }


async def stream_deltas(scheduler: Scheduler, body: ChatRequest, prompt: list[int]) -> AsyncGenerator[Delta]:
    """All choices, bit by bit, in the order they are made."""
    sampling = body.to_sampling(
        body.max_new_tokens(scheduler, prompt), body.top_logprobs or 0 if body.logprobs else None
    )
    async with aclosing(scheduler.generate([prompt] * (body.n or 1), sampling)) as events:
        async for event in events:
            logprobs = {"content": [_logprob(scheduler.runtime, body, event)]} if body.logprobs else None
            yield delta_of_event(event, body.n or 1, logprobs)


def _logprob(runtime: Runtime, body: ChatRequest, event: TokenEvent) -> JsonObject:
    """A token, its log-probability and the likeliest in its place, in the form of chat."""

    def row(token: int, logprob: float | None) -> JsonObject:
        text = runtime.tokenizer.decode([token], skip_special_tokens=False)
        whole = (
            None if REPLACEMENT_CHARACTER in text else list(text.encode())
        )  # of a part of a character they are not known here
        return {"token": token_name(runtime, body, token), "logprob": logprob, "bytes": whole}

    top = [row(*pair) for pair in (event.top_logprobs or {}).items()]
    return {**row(event.token_id, event.logprob), "top_logprobs": top}


def _message(place: int, message: JsonObject) -> JsonObject:
    """A message as templates know it: its content a text, the arguments of calls as objects. Raises APIError."""

    def refused(why: str) -> APIError:
        return APIError(400, f"messages[{place}]: {why}", "messages")

    if not isinstance(message.get("role"), str) or not message["role"]:
        raise refused("role has to be a text")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise refused("a part of content has to be of type 'text'")
        content = "\n".join(part["text"] for part in content)  # as vLLM
    calls = message.get("tool_calls") or []
    if not isinstance(content, str) and not (content is None and calls):
        raise refused("content has to be a text or a list of parts of type 'text'")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise refused("tool_calls has to be a list of objects")
    if calls:
        return {**message, "content": content, "tool_calls": [_parse_call_arguments(call) for call in calls]}
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


def _parse_call_arguments(call: JsonObject) -> JsonObject:
    """OpenAI's clients write arguments as JSON in a text; templates expect the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        return call
