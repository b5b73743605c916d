"""The routes /v1/models, and as in vLLM /tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, MinLen
from fastapi import FastAPI, Request

from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.text.chat_template import ChatTemplate
from limbeck.export.server.hot_swap import ServedModel
from limbeck.export.server.openai.chat import Conversation, JsonObject
from limbeck.export.server.openai.completions import encode
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.http import check_model, warn_of_unknown_fields
from limbeck.export.server.openai.tools import Tool


@dataclass(kw_only=True)
class TokenizeRequest:
    """The body of POST /tokenize: a text or a conversation."""

    prompt: str | None = None
    messages: Annotated[list[JsonObject], MinLen(1)] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    model: str | None = None
    add_special_tokens: bool | None = None  # default: True for a text; a chat template writes them itself
    # As in the other requests, but special tokens in a prompt are tokens by default: lm-eval asks for their ids here.
    parse_special: bool | None = None
    return_token_strs: bool | None = None

    def token_ids(self, runtime: Runtime, template: ChatTemplate | None) -> list[int]:
        """The token ids. Raises APIError unless exactly one of prompt and messages is given."""
        if (self.prompt is None) == (self.messages is None):
            raise APIError(400, "give either prompt or messages", "prompt")
        if self.messages is None:
            options = {"add_special_tokens": self.add_special_tokens is not False}
            return encode(
                runtime, self.prompt or "", "prompt", parse_special=self.parse_special is not False, **options
            )
        conversation = Conversation(
            messages=self.messages,
            tools=self.tools,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
            parse_special=self.parse_special,
        )
        text = conversation.render(template, runtime.special_tokens)
        return encode(runtime, text, "messages", add_special_tokens=bool(self.add_special_tokens))


@dataclass(kw_only=True)
class DetokenizeRequest:
    """The body of POST /detokenize."""

    tokens: list[Annotated[int, Ge(0)]]
    model: str | None = None


def add_model_routes(api: FastAPI, served: ServedModel) -> None:
    """Add the routes about the model and its tokenizer."""

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_entry(served)]}

    @api.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        check_model(served, model)
        return _entry(served)

    @api.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        await warn_of_unknown_fields(request, body)
        check_model(served, body.model)
        loaded = served.current()
        runtime = loaded.scheduler.runtime
        ids = await asyncio.to_thread(body.token_ids, runtime, loaded.template)
        names = [runtime.tokenizer.id_to_token(token) for token in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": runtime.max_length, "tokens": ids, "token_strs": names}

    @api.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
        await warn_of_unknown_fields(request, body)
        check_model(served, body.model)
        runtime = served.current().scheduler.runtime
        if max(body.tokens, default=0) >= runtime.vocab_size:
            raise APIError(400, f"tokens has an id outside 0 to {runtime.vocab_size - 1}", "tokens")
        text = await asyncio.to_thread(runtime.tokenizer.decode, body.tokens, skip_special_tokens=False)
        return {"prompt": text}

    @api.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        loaded = served.current()
        runtime = loaded.scheduler.runtime
        ends = min(runtime.eos_token_ids, default=None)
        ids = {"bos_token": runtime.bos_token_id, "eos_token": ends, "pad_token": runtime.pad_token_id}
        named = {name: None if token is None else runtime.tokenizer.id_to_token(token) for name, token in ids.items()}
        return {**named, "chat_template": loaded.template and loaded.template.source}


def _entry(served: ServedModel) -> dict[str, Any]:
    """The served model in OpenAI's format, with its context length, version and digest."""
    loaded = served.current()
    return {
        "id": served.name,
        "object": "model",
        "created": loaded.created,
        "owned_by": "limbeck",
        "max_model_len": loaded.scheduler.runtime.max_length,  # as in vLLM
        "version": loaded.version,
        "digest": loaded.digest,
    }
