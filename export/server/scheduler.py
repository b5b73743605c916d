"""The scheduler: accepts or refuses requests, queues them for the engine and streams their results."""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.export.runtime.embeddings import Pooling, embed
from limbeck.export.runtime.generation import TokenEvent
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import Sampling, log_softmax, top_tokens
from limbeck.export.server.engine import Engine
from limbeck.export.server.metrics import Metrics
from limbeck.export.server.requests import Limits, QueuedRequest, Row, Unavailable
from limbeck.registry.core.errors import BadInput


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one prompt token given the tokens before it; None and {} for the first token."""

    logprob: float | None
    top_logprobs: dict[int, float]


class Scheduler:
    """The requests of one loaded artifact. Call its methods from an event loop.

    The engine's thread ends and the model is freed when nothing refers to the scheduler any more; a running request
    is such a reference.

    Args:
        runtime: the loaded artifact.
        limits: what clients may take; None: the defaults.
        metrics: where to count; None: new metrics.
    """

    def __init__(self, runtime: Runtime, limits: Limits | None = None, metrics: Metrics | None = None) -> None:
        self.runtime = runtime
        self.limits = limits or Limits()
        self._engine = Engine(runtime, self.limits, metrics or Metrics())
        weakref.finalize(self, self._engine.stop)

    async def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> AsyncGenerator[TokenEvent]:
        """Yield the tokens of a request as they are generated, as `Runtime.generate_events`.

        Closing the generator cancels the request.

        Args:
            prompts: lists of token ids, one row each.
            sampling: the settings of all rows.

        Raises:
            BadInput: the request exceeds this server's limits.
            Unavailable: the queue is full, or the request takes too long.
        """
        self._check_prompt_length(prompts)
        max_new_tokens = self.limits.new_tokens
        if max_new_tokens is not None and sampling.max_new_tokens > max_new_tokens:
            raise BadInput(
                f"{sampling.max_new_tokens} new tokens are requested; this server generates at most {max_new_tokens}"
            )
        request = self._new_request()
        for index, prompt in enumerate(prompts):
            generation = self.runtime.start_generation(index, prompt, sampling)
            request.waiting_rows.append(Row(request, generation, list(prompt)))
        request.unfinished_rows = len(request.waiting_rows)
        async for event in self._stream_results(request):
            yield event

    async def prompt_logprobs(self, prompt: Sequence[int], top_logprobs: int) -> list[TokenLogprob]:
        """The log-probability of each prompt token, with the `top_logprobs` most likely tokens in its place.

        Raises as `generate`.
        """
        self._check_prompt_length([prompt])
        request = self._new_request()
        request.scoring = _prompt_logprobs(self.runtime, prompt, top_logprobs)
        request.scored_tokens = len(prompt)
        return [logprob async for logprob in self._stream_results(request)]

    async def embeddings(self, prompts: Sequence[Sequence[int]], pooling: Pooling) -> list[np.ndarray]:
        """The embedding of each prompt, (H,) float32 of length 1; the runtime must have its hidden states.

        Raises as `generate`.
        """
        self._check_prompt_length(prompts)
        request = self._new_request()
        chunks = (part for prompt in prompts for part in embed(self.runtime, prompt, pooling))
        request.scoring = ([] if part is None else [part] for part in chunks)
        request.scored_tokens = sum(map(len, prompts))
        return [vector async for vector in self._stream_results(request)]

    def _check_prompt_length(self, prompts: Sequence[Sequence[int]]) -> None:
        longest, limit = max(map(len, prompts)), self.limits.prompt_tokens
        if limit is not None and longest > limit:
            raise BadInput(f"the prompt has {longest} tokens; this server accepts at most {limit}")

    def _new_request(self) -> QueuedRequest:
        return QueuedRequest(asyncio.get_running_loop(), time.monotonic() + self.limits.timeout_s)

    async def _stream_results(self, request: QueuedRequest) -> AsyncGenerator[Any]:
        queued, rate = self._engine.queued_requests, self._engine.requests_per_s()
        if queued >= self.limits.queue + max(0, self._engine.free_rows):
            seconds = min(60, max(1, math.ceil(queued / rate))) if rate else 1
            message = f"{queued} requests are waiting already; try again in {seconds} s"
            raise Unavailable(429, message, "rate_limit_exceeded", seconds)
        self._engine.submit(request)
        try:
            while True:
                results = await request.results.get()
                if results is None:
                    return
                if isinstance(results, Exception):
                    raise results
                for result in results:
                    request.taken_results += 1
                    yield result
                if self._engine.is_sleeping:
                    self._engine.wake()
        finally:
            request.cancelled = True
            self._engine.wake()


def _prompt_logprobs(runtime: Runtime, prompt: Sequence[int], top_logprobs: int) -> Iterator[list[TokenLogprob]]:
    """The result of `Scheduler.prompt_logprobs`, in chunks, for the engine's thread."""
    yield [TokenLogprob(None, {})]
    done = 1
    for logits in runtime.prompt_logits(prompt):
        # The last position predicts a token that is not in the prompt.
        yield [_token_logprob(step, token, top_logprobs) for step, token in zip(logits, prompt[done:], strict=False)]
        done += len(logits)


def _token_logprob(logits: np.ndarray, token: int, top_logprobs: int) -> TokenLogprob:
    logprobs = log_softmax(logits.astype(np.float64))
    return TokenLogprob(float(logprobs[token]), top_tokens(logprobs, top_logprobs))
