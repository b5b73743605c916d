"""Requests and answers of /v1/completions, without HTTP.

The API is https://platform.openai.com/docs/api-reference/completions. Fields that it does not have are ignored.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, MaxLen, MinLen

from limbeck.export.runtime.generation import TokenEvent
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import Sampling
from limbeck.export.runtime.text.constraint import CompiledGrammar
from limbeck.export.runtime.text.detokenize import Detokenizer
from limbeck.export.server.openai.answers.parser import AnswerPart
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.scheduler import Scheduler, TokenLogprob
from limbeck.registry.core.errors import BadInput

MAX_CHOICES = 128  # prompts times n

JsonObject = dict[str, Any]
TokenIds = Annotated[list[int], MinLen(1)]
Penalty = Annotated[float, Ge(-2), Le(2)]
Bias = Annotated[float, Ge(-100), Le(100)]


@dataclass(kw_only=True)
class GenerationRequest:
    """The fields that completions and chat share. A field that is null has its default."""

    model: str | None = None
    temperature: Annotated[float, Ge(0), Le(2)] | None = None  # default: 1
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    top_k: Annotated[int, Ge(-1)] | None = None  # as in vLLM: 0 and -1 mean all tokens
    n: Annotated[int, Ge(1), Le(MAX_CHOICES)] | None = None  # default: 1
    stop: str | Annotated[list[Annotated[str, MinLen(1)]], MaxLen(16)] | None = None
    seed: Annotated[int, Ge(0)] | None = None
    ignore_eos: bool | None = None  # this and the three below are as in vLLM
    min_tokens: Annotated[int, Ge(0)] | None = None  # default: 0
    stop_token_ids: Annotated[list[Annotated[int, Ge(0)]], MaxLen(128)] | None = None
    skip_special_tokens: bool | None = None  # default: True
    parse_special: bool | None = None  # as in llama.cpp: special tokens in the prompt's text are tokens, not text
    return_tokens_as_token_ids: bool | None = None  # as in vLLM: name tokens "token_id:17", which is unique
    stream: bool | None = None
    stream_options: JsonObject | None = None  # include_usage
    frequency_penalty: Penalty | None = None  # default: 0
    presence_penalty: Penalty | None = None  # default: 0
    min_p: Annotated[float, Ge(0), Le(1)] | None = None  # default: 0; as in vLLM
    repetition_penalty: Annotated[float, Ge(0.01), Le(2)] | None = None  # default: 1; as in vLLM
    logit_bias: Annotated[dict[Annotated[int, Ge(0)], Bias], MaxLen(1024)] | None = None  # token id -> bias
    # Meant for servers with accounts and records: accepted and ignored.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def to_sampling(
        self, max_new_tokens: int, logprobs: int | None, constraint: CompiledGrammar | None = None
    ) -> Sampling:
        """The settings of generation. 0 new tokens (prompt logprobs only) count as 1, since no generation follows."""
        return Sampling(
            max_new_tokens=max(1, max_new_tokens),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=None if self.top_k in (0, -1) else self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            stop=[self.stop] if isinstance(self.stop, str) and self.stop else self.stop or [],
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            stop_token_ids=self.stop_token_ids or [],
            skip_special_tokens=self.skip_special_tokens is not False,
            constraint=constraint,
        )

    def usage_is_streamed(self) -> bool:
        """Whether a stream ends with a chunk of token usage."""
        return bool((self.stream_options or {}).get("include_usage"))


@dataclass(kw_only=True)
class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    max_tokens: Annotated[int, Ge(0)] | None = None  # default: 16
    logprobs: Annotated[int, Ge(0), Le(20)] | None = None
    echo: bool | None = None  # prompt logprobs, with `logprobs`; OpenAI's name
    best_of: int | None = None
    suffix: None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts: texts, or lists of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    def max_new_tokens(self) -> int:
        """The most new tokens of a choice."""
        return 16 if self.max_tokens is None else self.max_tokens


def encode_prompts(runtime: Runtime, body: CompletionRequest) -> list[list[int]]:
    """The token ids of the prompts. Raises APIError."""
    prompts, n = body.prompts(), body.n or 1
    if body.best_of not in (None, n):
        raise APIError(400, "best_of: only the value of n is supported", "best_of")
    if not 1 <= len(prompts) * n <= MAX_CHOICES:
        message = f"{len(prompts)} prompts with n={n}: a request can have 1 to {MAX_CHOICES} choices"
        raise APIError(400, message, "prompt")
    if body.max_new_tokens() == 0 and not body.echo:
        raise APIError(400, "max_tokens is 0 and echo is not set: nothing to do", "max_tokens")
    reserve, parse_special = min(1, body.max_new_tokens()), bool(body.parse_special)
    return [encode_prompt(runtime, prompt, reserve, "prompt", parse_special=parse_special) for prompt in prompts]


def encode(
    runtime: Runtime, text: str, param: str, *, add_special_tokens: bool = True, parse_special: bool = True
) -> list[int]:
    """Token ids of a text; see `Session.encode`. Raises APIError, naming the field `param`, for invalid Unicode."""
    try:
        return runtime.encode(text, parse_special=parse_special, add_special_tokens=add_special_tokens)
    except BadInput as error:
        raise APIError(400, error.message, param) from None


def encode_prompt(
    runtime: Runtime, prompt: str | Sequence[int], reserve: int, param: str, *, parse_special: bool = False
) -> list[int]:
    """Token ids of a prompt. Raises APIError if the context has no room for it and `reserve` more tokens."""
    ids = encode(runtime, prompt, param, parse_special=parse_special) if isinstance(prompt, str) else prompt
    if len(ids) + reserve > runtime.max_length:
        message = f"the context is {runtime.max_length} tokens; the prompt has {len(ids)}"
        raise APIError(400, f"{message} and needs room for {reserve} more", param, "context_length_exceeded")
    try:
        return runtime.prompt_ids(ids, reserve=reserve)
    except BadInput as error:
        raise APIError(400, error.message, param) from None


@dataclass
class Usage:
    """The token counts of a request."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache

    def add(self, delta: Delta) -> None:
        """Count the tokens of a delta."""
        self.completion_tokens += delta.new_tokens
        self.cached_tokens += delta.cached_tokens

    def to_json(self) -> dict[str, Any]:
        """The counts in OpenAI's format."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class Delta:
    """New text and tokens of one choice."""

    index: int  # of the choice
    part: AnswerPart
    finish_reason: str | None = None
    logprobs: dict[str, list[Any]] | None = None  # in OpenAI's format: lists with an entry per token
    new_tokens: int = 0
    cached_tokens: int = 0  # of the prompt; only on the first token of its first choice


def delta_of_event(event: TokenEvent, n: int, logprobs: dict[str, list[Any]] | None) -> Delta:
    """The delta of one new token, in a request with `n` choices per prompt."""
    cached = 0 if event.index % n else event.cached_tokens
    return Delta(event.index, AnswerPart(event.text), event.finish_reason, logprobs, 1, cached)


class CompletionFormatter:
    """Formats answers of /v1/completions."""

    id_prefix, object_type, chunk_object_type = "cmpl", "text_completion", "text_completion"

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a streamed choice: none."""
        return None

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """A chunk of a streamed choice."""
        return self.choice(delta)

    def choice(self, delta: Delta) -> dict[str, Any]:
        """A complete choice."""
        return {
            "index": delta.index,
            "text": delta.part.text,
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
        }


async def stream_deltas(
    scheduler: Scheduler, body: CompletionRequest, prompts: list[list[int]]
) -> AsyncGenerator[Delta]:
    """Yield the deltas of all choices: the prompts first with `echo`, then tokens in the order of generation."""
    runtime = scheduler.runtime
    n = body.n or 1
    rows = [prompt for prompt in prompts for _ in range(n)]
    lengths = [0] * len(rows)  # characters of each choice so far
    if body.echo:
        async for delta in _prompt_deltas(scheduler, body, prompts):
            lengths[delta.index] = len(delta.part.text)
            yield delta
    if body.max_new_tokens() == 0:
        return
    async with aclosing(scheduler.generate(rows, body.to_sampling(body.max_new_tokens(), body.logprobs))) as events:
        async for event in events:
            logprobs = None
            if event.logprob is not None:
                top = event.top_logprobs or None
                logprobs = _logprobs(runtime, body, [event.token_id], [event.logprob], [top], [lengths[event.index]])
            lengths[event.index] += len(event.text)
            yield delta_of_event(event, n, logprobs)


async def _prompt_deltas(
    scheduler: Scheduler, body: CompletionRequest, prompts: list[list[int]]
) -> AsyncGenerator[Delta]:
    """Yield the text of each prompt for each of its choices, with its logprobs if they are requested."""
    runtime, n = scheduler.runtime, body.n or 1
    for place, (prompt, given) in enumerate(zip(prompts, body.prompts(), strict=True)):
        text = given if isinstance(given, str) else runtime.decode(prompt)
        logprobs = None
        if body.logprobs is not None:
            values = await scheduler.prompt_logprobs(prompt, body.logprobs)
            logprobs = _format_prompt_logprobs(runtime, prompt, values, body)
        for index in range(place * n, place * n + n):
            yield Delta(index, AnswerPart(text), None if body.max_new_tokens() else "length", logprobs)


def _format_prompt_logprobs(
    runtime: Runtime, prompt: list[int], scores: Sequence[TokenLogprob], body: CompletionRequest
) -> dict[str, list[Any]]:
    """Prompt logprobs in OpenAI's format."""
    text = Detokenizer(runtime.token_bytes, [])
    offsets = []
    for token in prompt:
        offsets.append(len(text.text))
        text.add(token)
    values = [score.logprob for score in scores]
    top_logprobs = [score.top_logprobs or None for score in scores]
    return _logprobs(runtime, body, prompt, values, top_logprobs, offsets)


def _logprobs(
    runtime: Runtime,
    body: CompletionRequest,
    ids: Sequence[int],
    values: Sequence[float | None],
    top_logprobs: Sequence[dict[int, float] | None],
    offsets: Sequence[int],
) -> dict[str, list[Any]]:
    """Tokens and their log-probabilities in OpenAI's format; `offsets` are characters in the choice's text."""
    named: list[dict[str, float] | None] = []
    for token, value, top in zip(ids, values, top_logprobs, strict=True):
        # OpenAI's list also contains the chosen token, even if it is not among the most likely.
        shown = {**top, token: value} if top and value is not None else {}
        named.append({token_name(runtime, body, other): p for other, p in shown.items()} or None)
    return {
        "tokens": [token_name(runtime, body, token) for token in ids],
        "token_logprobs": list(values),
        "top_logprobs": named,
        "text_offset": list(offsets),
    }


def token_name(runtime: Runtime, body: GenerationRequest, token: int) -> str:
    """The name of a token in logprobs: its text, or its vocabulary entry if that is not whole characters; or its id."""
    if body.return_tokens_as_token_ids:
        return f"token_id:{token}"
    try:
        return runtime.token_bytes[token].decode()
    except UnicodeDecodeError:
        return str(runtime.tokenizer.id_to_token(token))
