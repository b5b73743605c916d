"""Requests that arrive together, and the one thread that runs the model for them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from export.generation import Event
from export.runtime import Runtime
from export.sampling import Sampling, likeliest, log_softmax
from export.worker import Worker


@dataclass(frozen=True)
class Scored:
    """What the model says of one token of a prompt; None and {} for the first, which nothing precedes."""

    logprob: float | None
    top_logprobs: dict[int, float]


class Scheduler:
    """Takes turns on one loaded artifact. Its methods are called from the event loop."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._worker = Worker()

    async def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> AsyncGenerator[Event]:
        """The tokens of a request as they come, `prompts` token ids, one row each; as `Runtime.events`.

        Closing the generator ends the request.
        """
        async for event in self._worker.results(lambda: self.runtime.events(prompts, sampling)):
            yield event

    async def score(self, prompt: Sequence[int], top: int) -> list[Scored]:
        """Each prompt token's log-probability given those before it, and the `top` likeliest at its place."""
        return [scored async for scored in self._worker.results(lambda: _scores(self.runtime, prompt, top))]


def _scores(runtime: Runtime, prompt: Sequence[int], top: int) -> Iterator[Scored]:
    yield Scored(None, {})
    steps = (step for piece in runtime.prompt_logits(prompt) for step in piece)
    for token, step in zip(prompt[1:], steps, strict=False):  # what the last step predicts is not in the prompt
        logprobs = log_softmax(step.astype(np.float64))
        yield Scored(float(logprobs[token]), likeliest(logprobs, top))
