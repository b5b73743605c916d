"""Requests and answers of /v1/chat/completions, without HTTP.

The API is https://platform.openai.com/docs/api-reference/chat. Tools are passed to the chat template; the calls that
the model writes are not parsed, but stay in the text of the answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from limbeck.export.runtime.generation import TokenEvent
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.text.chat_template import ChatTemplate
from limbeck.export.runtime.text.special_tokens import SpecialTokens
from limbeck.export.server.openai.completions import (
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
# Arguments of the template that have their own field, or are not for clients.
RESERVED_SETTINGS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
RESERVED_SETTINGS |= {"range", "self"}


@dataclass(kw_only=True)
class Conversation:
    """Messages, and the settings of the chat template that renders them into a prompt."""

    messages: Annotated[list[JsonObject], MinLen(1)]
    tools: list[JsonObject] | None = None
    documents: list[JsonObject] | None = None  # this and the three below are as in vLLM
    add_generation_prompt: bool | None = None  # default: True, unless the last message is continued
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    parse_special: bool | None = None  # special tokens in messages are tokens, not text; as in llama.cpp

    def render(self, template: ChatTemplate | None, special_tokens: SpecialTokens) -> str:
        """The text of the prompt, in which special tokens from outside are escaped. Raises APIError."""
        if template is None:
            raise APIError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        continues = bool(self.continue_final_message)
        add_generation_prompt = self.add_generation_prompt
        if add_generation_prompt is None:
            add_generation_prompt = not continues
        if continues and add_generation_prompt:
            message = "continue_final_message and add_generation_prompt cannot both be true"
            raise APIError(400, message, "continue_final_message")
        settings = self.chat_template_kwargs or {}
        reserved = RESERVED_SETTINGS & settings.keys()
        if reserved:
            raise APIError(400, f"{min(reserved)} cannot be set by chat_template_kwargs", "chat_template_kwargs")
        messages = [_message(index, message) for index, message in enumerate(self.messages)]
        try:
            return template.render(
                messages,
                tools=self.tools or None,
                documents=self.documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continues,
                settings=settings,
                escape=deepcopy if self.parse_special else special_tokens.escape,
            )
        except BadInput as error:
            raise APIError(400, error.message, "messages") from None


@dataclass(kw_only=True)
class ResponseFormat:
    """Only plain text is supported."""

    type: Literal["text"]


@dataclass(kw_only=True)
class ChatRequest(Conversation, GenerationRequest):
    """The body of POST /v1/chat/completions."""

    __pydantic_config__ = {"extra": "forbid"}

    max_completion_tokens: Annotated[int, Ge(1)] | None = None  # default: what the context allows
    max_tokens: Annotated[int, Ge(1)] | None = None  # its deprecated name
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Ge(0), Le(20)] | None = None
    # Accepted with values that change nothing.
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    def prompt_ids(self, runtime: Runtime, template: ChatTemplate | None) -> list[int]:
        """Token ids of the prompt. Raises APIError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs", "top_logprobs")
        if self.tool_choice == "none":
            self.tools = None
        # The template writes the special tokens, so the tokenizer adds none.
        ids = encode(runtime, self.render(template, runtime.special_tokens), "messages", add_special_tokens=False)
        return encode_prompt(runtime, ids, 1, "messages")

    def max_new_tokens(self, scheduler: Scheduler, prompt: list[int]) -> int:
        """The most new tokens of a choice: as requested, or what the context and the server allow."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        if self.max_tokens is not None:
            return self.max_tokens
        room = scheduler.runtime.max_length - len(prompt)
        return min(room, scheduler.limits.new_tokens or room)


class ChatFormatter:
    """Formats answers of /v1/chat/completions."""

    id_prefix, object_type, chunk_object_type = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_chunk(self, index: int) -> JsonObject | None:
        """The first chunk of a streamed choice."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, delta: Delta) -> JsonObject:
        """A chunk of a streamed choice."""
        content = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        return {
            "index": delta.index,
            "delta": content,
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
        }

    def choice(self, delta: Delta) -> JsonObject:
        """A complete choice."""
        message = {"role": "assistant", "content": delta.text}
        return {
            "index": delta.index,
            "message": message,
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
        }


async def stream_deltas(scheduler: Scheduler, body: ChatRequest, prompt: list[int]) -> AsyncGenerator[Delta]:
    """Yield the deltas of all choices in the order of generation."""
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = body.to_sampling(body.max_new_tokens(scheduler, prompt), top_logprobs)
    async with aclosing(scheduler.generate([prompt] * (body.n or 1), sampling)) as events:
        async for event in events:
            logprobs = {"content": [_logprob(scheduler.runtime, body, event)]} if body.logprobs else None
            yield delta_of_event(event, body.n or 1, logprobs)


def _logprob(runtime: Runtime, body: ChatRequest, event: TokenEvent) -> JsonObject:
    """A token with its log-probability and the most likely tokens in its place, in OpenAI's format."""

    def entry(token: int, logprob: float | None) -> JsonObject:
        name, encoded = token_name(runtime, body, token), list(runtime.token_bytes[token])
        return {"token": name, "logprob": logprob, "bytes": encoded}

    top = [entry(token, logprob) for token, logprob in (event.top_logprobs or {}).items()]
    return {**entry(event.token_id, event.logprob), "top_logprobs": top}


def _message(index: int, message: JsonObject) -> JsonObject:
    """Convert a message for the template: content as a text, arguments of tool calls as objects. Raises APIError."""

    def refusal(reason: str) -> APIError:
        return APIError(400, f"messages[{index}]: {reason}", "messages")

    if not isinstance(message.get("role"), str) or not message["role"]:
        raise refusal("role must be a text")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise refusal("each part of content must be of type 'text'")
        content = "\n".join(part["text"] for part in content)  # as vLLM
    calls = message.get("tool_calls") or []
    if not isinstance(content, str) and not (content is None and calls):
        raise refusal("content must be a text or a list of parts of type 'text'")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise refusal("tool_calls must be a list of objects")
    if calls:
        return {**message, "content": content, "tool_calls": [_parse_call_arguments(call) for call in calls]}
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


def _parse_call_arguments(call: JsonObject) -> JsonObject:
    """Parse a call's arguments: OpenAI's clients send them as JSON in a text, templates expect an object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        return call
