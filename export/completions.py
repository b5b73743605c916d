"""What /v1/completions is asked and what it answers, without the HTTP around it.

The API is that of https://platform.openai.com/docs/api-reference/completions; what is not implemented is
refused by name.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, MaxLen, MinLen

from export.detokenize import BROKEN, Detokenizer
from export.runtime import Runtime
from export.sampling import Sampling
from export.scheduler import Scheduler, Scored
from registry.errors import BadInput

MAX_CHOICES = 128  # prompts times n

TokenIds = Annotated[list[int], MinLen(1)]
Zero = Annotated[float, Ge(0), Le(0)]  # accepted where it changes nothing


@dataclass
class CompletionRequest:
    """The body of POST /v1/completions. A field that is null has its default."""

    __pydantic_config__ = {"extra": "forbid"}

    prompt: str | list[str] | TokenIds | list[TokenIds]
    model: str | None = None
    max_tokens: Annotated[int, Ge(0)] | None = None  # 16
    temperature: Annotated[float, Ge(0), Le(2)] | None = None  # 1
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    top_k: Annotated[int, Ge(1)] | None = None  # as in vLLM
    n: Annotated[int, Ge(1), Le(MAX_CHOICES)] | None = None  # 1
    stop: str | Annotated[list[Annotated[str, MinLen(1)]], MaxLen(16)] | None = None
    seed: Annotated[int, Ge(0)] | None = None
    logprobs: Annotated[int, Ge(0), Le(20)] | None = None
    return_tokens_as_token_ids: bool | None = None  # as in vLLM: tokens are named "token_id:17", which no two share
    echo: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None
    user: str | None = None  # taken and not used
    best_of: int | None = None
    suffix: None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], MaxLen(0)] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    def length(self) -> int:
        """The most new tokens of a choice."""
        return 16 if self.max_tokens is None else self.max_tokens

    def sampling(self) -> Sampling:
        """What is asked of generation; for `length()` 0 it is asked of nobody."""
        return Sampling(
            max_new_tokens=max(1, self.length()),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=[self.stop] if isinstance(self.stop, str) and self.stop else self.stop or [],
            logprobs=self.logprobs,
        )


class APIError(Exception):
    """A request that is refused, as OpenAI's API tells it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def token_ids(runtime: Runtime, body: CompletionRequest) -> list[list[int]]:
    """The token ids of the prompts. Raises APIError."""
    prompts, n = body.prompts(), body.n or 1
    if body.best_of not in (None, n):
        raise APIError(400, "best_of: only the value of n is supported", "best_of")
    if not 1 <= len(prompts) * n <= MAX_CHOICES:
        message = f"{len(prompts)} prompts with n={n}: 1 to {MAX_CHOICES} choices are served at once"
        raise APIError(400, message, "prompt")
    if body.length() == 0 and not body.echo:
        raise APIError(400, "max_tokens is 0, and there is no echo: nothing is asked for", "max_tokens")
    try:
        return [runtime.prompt_ids(prompt, room=min(1, body.length())) for prompt in prompts]
    except BadInput as error:
        raise APIError(400, error.message, "prompt") from None


@dataclass
class Usage:
    """The tokens of a request."""

    prompt: int
    completion: int = 0

    def row(self) -> dict[str, int]:
        """In OpenAI's form."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True)
class Delta:
    """What a choice grows by."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: dict[str, list[Any]] | None = None  # in OpenAI's form, lists with an entry for each token
    new_tokens: int = 0

    def row(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {
            "index": self.index,
            "text": self.text,
            "logprobs": self.logprobs,
            "finish_reason": self.finish_reason,
        }


async def deltas(scheduler: Scheduler, body: CompletionRequest, prompts: list[list[int]]) -> AsyncGenerator[Delta]:
    """All choices, bit by bit, in the order they are made. The streamed answer and the whole one are both this."""
    runtime = scheduler.runtime
    n = body.n or 1
    rows = [prompt for prompt in prompts for _ in range(n)]
    lengths = [0] * len(rows)  # of the text so far
    if body.echo:
        for place, (prompt, given) in enumerate(zip(prompts, body.prompts(), strict=True)):
            text = given if isinstance(given, str) else runtime.decode(prompt)
            logprobs = None
            if body.logprobs is not None:
                logprobs = _of_prompt(runtime, prompt, await scheduler.score(prompt, body.logprobs), body)
            for index in range(place * n, place * n + n):
                lengths[index] = len(text)
                yield Delta(index, text, None if body.length() else "length", logprobs)
    if body.length() == 0:
        return
    async with aclosing(scheduler.generate(rows, body.sampling())) as events:
        async for event in events:
            logprobs = None
            if event.logprob is not None:
                top = event.top_logprobs or None
                logprobs = _logprobs(runtime, body, [event.token_id], [event.logprob], [top], [lengths[event.index]])
            lengths[event.index] += len(event.piece)
            yield Delta(event.index, event.piece, event.finish_reason, logprobs, new_tokens=1)


def _of_prompt(
    runtime: Runtime, prompt: list[int], scores: Sequence[Scored], body: CompletionRequest
) -> dict[str, list[Any]]:
    """What the model says of a prompt, in OpenAI's form."""
    text = Detokenizer(runtime.decode, [])
    offsets = []
    for token in prompt:
        offsets.append(len(text.text))
        text.add(token)
    values, tops = [scored.logprob for scored in scores], [scored.top_logprobs or None for scored in scores]
    return _logprobs(runtime, body, prompt, values, tops, offsets)


def _logprobs(
    runtime: Runtime,
    body: CompletionRequest,
    ids: Sequence[int],
    values: Sequence[float | None],
    tops: Sequence[dict[int, float] | None],
    offsets: Sequence[int],
) -> dict[str, list[Any]]:
    """Tokens and their log-probabilities in OpenAI's form."""
    named: list[dict[str, float] | None] = []
    for token, value, top in zip(ids, values, tops, strict=True):
        # OpenAI's list holds the chosen token too, where it is not among the likeliest.
        shown = {**top, token: value} if top and value is not None else {}
        named.append({_name(runtime, body, other): p for other, p in shown.items()} or None)
    return {
        "tokens": [_name(runtime, body, token) for token in ids],
        "token_logprobs": list(values),
        "top_logprobs": named,
        "text_offset": list(offsets),
    }


def _name(runtime: Runtime, body: CompletionRequest, token: int) -> str:
    """A token alone: its text, or its name in the vocabulary where it is no whole character; or its id."""
    if body.return_tokens_as_token_ids:
        return f"token_id:{token}"
    text = runtime.tokenizer.decode([token], skip_special_tokens=False)
    return runtime.tokenizer.id_to_token(token) or text if BROKEN in text else text
