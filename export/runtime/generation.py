"""One prompt while it is completed: which token comes next, the text so far, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from limbeck.export.runtime.detokenize import Detokenizer
from limbeck.export.runtime.sampling import Sampler, Sampling, log_softmax, top_tokens


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    text: str
    token_ids: list[int]  # with the end-of-text token where the model gave one
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    prefill_s: float  # from the call to the batch's first token
    decode_s: float  # from there to the batch's last token
    logprobs: list[float] | None = None  # of each token, natural log, before temperature, top-k and top-p
    top_logprobs: list[dict[int, float]] | None = None  # the likeliest tokens at each step


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one prompt of a request."""

    index: int  # of the prompt
    token_id: int
    text: str  # the text that is now certain; often ""
    finish_reason: Literal["stop", "length"] | None  # None while more follows
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    cached_tokens: int = 0  # of the prompt, that were not read again; told with its first token


class GenerationState:
    """One prompt of a request while it is completed.

    Args:
        index: the prompt's place in the request.
        prompt: token ids, not empty.
        room: the most new tokens: what the context leaves.
        eos_token_ids: the tokens that end a text.
        decode: token ids to text.
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        context_left: int,
        eos_token_ids: set[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self.index, self.prompt, self.sampling = index, prompt, sampling
        self.finish_reason: Literal["stop", "length"] | None = None
        self.last_token = 0  # the newest token
        self.max_new_tokens = min(sampling.max_new_tokens, context_left)
        self.token_count = 0
        self._end_token_ids = set() if sampling.ignore_eos else eos_token_ids
        self._sampler = Sampler(sampling, prompt, index)
        self._detokenizer = Detokenizer(decode, prompt, sampling.stop)

    def choose_token(self, logits: np.ndarray) -> TokenEvent:
        """Choose the next token from (V,) logits."""
        self.last_token = token = self._sampler.choose(logits)
        self.token_count += 1
        ended = token in self._end_token_ids
        piece = "" if ended else self._detokenizer.add(token)
        if ended or self._detokenizer.stopped:
            self.finish_reason = "stop"
        elif self.token_count >= self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            piece += self._detokenizer.finish()
            # The rest may hold a stop string that was not certain before.
            self.finish_reason = "stop" if self._detokenizer.stopped else self.finish_reason
        if self.sampling.logprobs is None:
            return TokenEvent(self.index, token, piece, self.finish_reason)
        logprobs = log_softmax(logits.astype(np.float64))
        top = top_tokens(logprobs, self.sampling.logprobs)
        return TokenEvent(self.index, token, piece, self.finish_reason, float(logprobs[token]), top)
