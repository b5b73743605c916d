"""Requests and answers of /v1/chat/completions, without HTTP.

The API is https://platform.openai.com/docs/api-reference/chat. Fields that it does not have are ignored.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from limbeck.export.runtime.generation import TokenEvent
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.text.chat_template import ChatTemplate
from limbeck.export.runtime.text.constraint import CompiledGrammar
from limbeck.export.runtime.text.special_tokens import SpecialTokens
from limbeck.export.server.hot_swap import LoadedArtifact
from limbeck.export.server.openai.answers.parser import AnswerParser
from limbeck.export.server.openai.answers.reasoning import CLOSE, OPEN, Thinking, thinking_of_prompt
from limbeck.export.server.openai.answers.tool_calls import CallPart
from limbeck.export.server.openai.completions import (
    Delta,
    GenerationRequest,
    delta_of_event,
    encode,
    encode_prompt,
    token_name,
)
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.grammar import (
    MAX_CALLS,
    AnswerGrammar,
    ResponseFormat,
    Schema,
    compile_grammar,
    has_special_token,
    schema_of_format,
    schemas_of_tools,
)
from limbeck.export.server.openai.messages import messages_for_template
from limbeck.export.server.openai.tools import (
    HERMES,
    NamedTool,
    Tool,
    ToolFormat,
    describe_tools,
    format_of_template,
    write_calls,
)
from limbeck.export.server.scheduler import Scheduler
from limbeck.registry.core.errors import BadInput

JsonObject = dict[str, Any]
# Arguments of the template that have their own field, or are not for clients.
RESERVED_SETTINGS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
RESERVED_SETTINGS |= {"range", "self"}
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


@dataclass(kw_only=True)
class Conversation:
    """Messages, and the settings of the chat template that renders them into a prompt."""

    messages: Annotated[list[JsonObject], MinLen(1)]
    tools: list[Tool] | None = None
    documents: list[JsonObject] | None = None  # this and the three below are as in vLLM
    add_generation_prompt: bool | None = None  # default: True, unless the last message is continued
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    parse_special: bool | None = None  # special tokens in messages are tokens, not text; as in llama.cpp
    reasoning_effort: ReasoningEffort | None = None  # for templates that know it; "none" also disables thinking

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
        source = template.source_with_tools if self.tools else template.source
        messages = messages_for_template(self.messages, source)
        tools = [tool.to_template() for tool in self.tools or []]
        if "tools" not in source:
            messages = write_calls(messages)
            messages = describe_tools(messages, tools) if tools else messages
        try:
            return template.render(
                messages,
                tools=tools or None,
                documents=self.documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continues,
                settings=self._settings(),
                escape=deepcopy if self.parse_special else special_tokens.escape,
            )
        except BadInput as error:
            raise APIError(400, error.message, "messages") from None

    def _settings(self) -> JsonObject:
        """Other variables of the template. Raises APIError."""
        settings: JsonObject = {}
        if self.reasoning_effort is not None:
            settings["reasoning_effort"] = self.reasoning_effort
        if self.reasoning_effort == "none":
            settings["enable_thinking"] = False
        settings |= self.chat_template_kwargs or {}
        reserved = RESERVED_SETTINGS & settings.keys()
        if reserved:
            raise APIError(400, f"{min(reserved)} cannot be set by chat_template_kwargs", "chat_template_kwargs")
        return settings


@dataclass(frozen=True)
class PreparedChat:
    """What generation needs of a chat request."""

    prompt: list[int]  # token ids
    thinking: Thinking
    tool_format: ToolFormat | None  # None: the answer has no calls
    names: tuple[str, ...]  # of the functions that the answer may call
    constraint: CompiledGrammar | None
    keeps_special_tokens: bool  # some mark the calls or the reasoning


@dataclass(kw_only=True)
class ChatRequest(Conversation, GenerationRequest):
    """The body of POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int, Ge(1)] | None = None  # default: what the context allows
    max_tokens: Annotated[int, Ge(1)] | None = None  # its deprecated name
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Ge(0), Le(20)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None  # default: auto
    parallel_tool_calls: bool | None = None  # default: True
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    def prepare(self, loaded: LoadedArtifact) -> PreparedChat:
        """Render and encode the prompt, and compile what the answer must be. Raises APIError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs", "top_logprobs")
        if self.tool_choice == "none":
            self.tools = None
        runtime, template = loaded.scheduler.runtime, loaded.template
        text = self.render(template, runtime.special_tokens)
        # The template writes the special tokens, so the tokenizer adds none.
        ids = encode_prompt(runtime, encode(runtime, text, "messages", add_special_tokens=False), 1, "messages")
        source = template.source_with_tools if template else ""
        thinking = thinking_of_prompt(source, text, bool(self.continue_final_message))
        tool_format = format_of_template(source) if self.tools else None
        markers = [OPEN, CLOSE] if thinking is not Thinking.NEVER else []
        markers += tool_format.markers() if tool_format else []
        names = tuple(tool.function.name for tool in self.tools or [])
        constraint = self._constraint(loaded, thinking, tool_format)
        special = has_special_token(runtime.tokenizer, markers)
        return PreparedChat(ids, thinking, tool_format, names, constraint, special)

    def _constraint(
        self, loaded: LoadedArtifact, thinking: Thinking, tool_format: ToolFormat | None
    ) -> CompiledGrammar | None:
        """What the answer must be; None: any text. Raises APIError."""
        answer = schema_of_format(self.response_format, "response_format")
        calls = self._callable_functions()
        is_auto = self.tool_choice in (None, "auto")
        has_text = is_auto and bool(calls) and answer is None
        if (not calls and answer is None) or (has_text and not (tool_format and tool_format.opener)):
            return None
        grammar = AnswerGrammar(
            thinking=thinking,
            tool_format=tool_format or HERMES,
            calls=calls,
            max_calls=1 if self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool) else MAX_CALLS,
            answer=answer if is_auto or not calls else None,
            has_text=has_text,
        )
        schemas = [*calls.values(), *([answer] if answer else [])]
        try:
            return compile_grammar(loaded.grammars, grammar, schemas)
        except APIError:
            if has_text and not any(schema.strict for schema in schemas):
                return None  # the calls of this request are not guaranteed to be valid
            raise

    def _callable_functions(self) -> dict[str, Schema]:
        """The schema of the arguments of each function that may be called. Raises APIError."""
        functions = schemas_of_tools(self.tools or [])
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in functions:
                raise APIError(400, f"tool_choice names {name!r}, which is not in tools", "tool_choice")
            return {name: functions[name]}
        if self.tool_choice == "required" and not functions:
            raise APIError(400, "tool_choice is 'required', but there are no tools", "tool_choice")
        return functions

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

    def chunk(self, delta: Delta) -> JsonObject | None:
        """A chunk of a streamed choice; None if there is nothing to send."""
        part = delta.part
        content: JsonObject = {}
        if part.reasoning:
            content["reasoning_content"] = part.reasoning
        if part.text:
            content["content"] = part.text
        if part.calls:
            content["tool_calls"] = [_call_delta(call) for call in part.calls]
        if not content and delta.logprobs is None and delta.finish_reason is None:
            return None
        return {
            "index": delta.index,
            "delta": content,
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
        }

    def choice(self, delta: Delta) -> JsonObject:
        """A complete choice."""
        part = delta.part
        message: JsonObject = {"role": "assistant", "content": part.text or (None if part.calls else "")}
        if part.reasoning:
            message["reasoning_content"] = part.reasoning
        if part.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in part.calls
            ]
        return {
            "index": delta.index,
            "message": message,
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
        }


def _call_delta(call: CallPart) -> JsonObject:
    """A part of a tool call in a chunk."""
    if not call.id:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


async def stream_deltas(scheduler: Scheduler, body: ChatRequest, chat: PreparedChat) -> AsyncGenerator[Delta]:
    """Yield the deltas of all choices in the order of generation."""
    n, top_logprobs = body.n or 1, (body.top_logprobs or 0) if body.logprobs else None
    sampling = body.to_sampling(body.max_new_tokens(scheduler, chat.prompt), top_logprobs, chat.constraint)
    if chat.keeps_special_tokens:
        sampling = replace(sampling, skip_special_tokens=False)
    parsers = [AnswerParser(chat.thinking, chat.tool_format, chat.names) for _ in range(n)]
    async with aclosing(scheduler.generate([chat.prompt] * n, sampling)) as events:
        async for event in events:
            parser = parsers[event.index]
            part = parser.add(event.text, is_last=event.finish_reason is not None)
            logprobs = {"content": [_logprob(scheduler.runtime, body, event)]} if body.logprobs else None
            delta = replace(delta_of_event(event, n, logprobs), part=part)
            if delta.finish_reason == "stop" and parser.has_calls:
                delta = replace(delta, finish_reason="tool_calls")
            yield delta


def _logprob(runtime: Runtime, body: ChatRequest, event: TokenEvent) -> JsonObject:
    """A token with its log-probability and the most likely tokens in its place, in OpenAI's format."""

    def entry(token: int, logprob: float | None) -> JsonObject:
        name, encoded = token_name(runtime, body, token), list(runtime.token_bytes[token])
        return {"token": name, "logprob": logprob, "bytes": encoded}

    top = [entry(token, logprob) for token, logprob in (event.top_logprobs or {}).items()]
    return {**entry(event.token_id, event.logprob), "top_logprobs": top}
