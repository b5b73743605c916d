"""Where requests come in: what is refused at once, what waits, and how results reach the event loop."""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.export.runtime.generation import TokenEvent
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import Sampling, log_softmax, top_tokens
from limbeck.export.server.engine import Engine
from limbeck.export.server.metrics import Metrics
from limbeck.export.server.requests import Limits, QueuedRequest, Row, Unavailable
from limbeck.registry.core.errors import BadInput


@dataclass(frozen=True)
class TokenLogprob:
    """What the model says of one token of a prompt; None and {} for the first, which nothing precedes."""

    logprob: float | None
    top_logprobs: dict[int, float]


class Scheduler:
    """The requests of one loaded artifact. Its methods are called from the event loop.

    Its thread and its model go when nobody holds the scheduler any more, running requests included.
    """

    def __init__(self, runtime: Runtime, limits: Limits | None = None, metrics: Metrics | None = None) -> None:
        self.runtime = runtime
        self.limits = limits or Limits()
        self._engine = Engine(runtime, self.limits, metrics or Metrics())
        weakref.finalize(self, self._engine.stop)

    async def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> AsyncGenerator[TokenEvent]:
        """The tokens of a request as they come, `prompts` token ids, one row each; as `Runtime.events`.

        Closing the generator ends the request.

        Raises:
            BadInput: more than this server's limits allow. Unavailable: no room or no time.
        """
        self._check(prompts)
        most = self.limits.new_tokens
        if most is not None and sampling.max_new_tokens > most:
            raise BadInput(f"{sampling.max_new_tokens} new tokens are asked for; this server gives at most {most}")
        request = self._new_request()
        for index, prompt in enumerate(prompts):
            generation = self.runtime.start_generation(index, prompt, sampling)
            request.waiting_rows.append(Row(request, generation, list(prompt)))
        request.unfinished_rows = len(request.waiting_rows)
        async for event in self._stream_results(request):
            yield event

    async def prompt_logprobs(self, prompt: Sequence[int], top_logprobs: int) -> list[TokenLogprob]:
        """Each prompt token's log-probability given those before it, and the `top_logprobs` likeliest at its place.

        Raises as `generate`.
        """
        self._check([prompt])
        request = self._new_request()
        request.prompt_logprobs = _prompt_logprobs(self.runtime, prompt, top_logprobs)
        return [scored async for scored in self._stream_results(request)]

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        longest, most = max(map(len, prompts)), self.limits.prompt_tokens
        if most is not None and longest > most:
            raise BadInput(f"the prompt has {longest} tokens; this server takes at most {most}")

    def _new_request(self) -> QueuedRequest:
        return QueuedRequest(asyncio.get_running_loop(), time.monotonic() + self.limits.timeout_s)

    async def _stream_results(self, request: QueuedRequest) -> AsyncGenerator[Any]:
        queued, rate = self._engine.queued_requests, self._engine.requests_per_s()
        if queued >= self.limits.queue + max(0, self._engine.free_rows):
            seconds = min(60, max(1, math.ceil(queued / rate))) if rate else 1
            message = f"{queued} requests wait already; try again in {seconds} s"
            raise Unavailable(429, message, "rate_limit_exceeded", seconds)
        self._engine.submit(request)
        try:
            while (results := await request.results.get()) is not None:
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
    """What `Scheduler.score` gives, piece by piece."""
    yield [TokenLogprob(None, {})]
    done = 1
    for logits in runtime.prompt_logits(prompt):
        # What the last position predicts is not in the prompt.
        yield [_token_logprob(step, token, top_logprobs) for step, token in zip(logits, prompt[done:], strict=False)]
        done += len(logits)


def _token_logprob(logits: np.ndarray, token: int, top_logprobs: int) -> TokenLogprob:
    logprobs = log_softmax(logits.astype(np.float64))
    return TokenLogprob(float(logprobs[token]), top_tokens(logprobs, top_logprobs))
