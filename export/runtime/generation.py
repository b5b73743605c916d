"""The state of one prompt during generation: its next token, its text and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from limbeck.export.runtime.sampling import Sampler, Sampling, log_softmax, top_tokens
from limbeck.export.runtime.text.detokenize import Detokenizer
from limbeck.export.runtime.text.token_bytes import TokenBytes


@dataclass(frozen=True)
class Completion:
    """The completion of one prompt."""

    text: str
    token_ids: list[int]  # with the end-of-text token if the model generated one
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    prefill_s: float  # seconds from the call to the first token of the batch
    decode_s: float  # seconds from the first to the last token of the batch
    logprobs: list[float] | None = None  # of each token: natural logarithm, before temperature, top-k and top-p
    top_logprobs: list[dict[int, float]] | None = None  # of each token: the most likely tokens in its place


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one prompt of a request."""

    index: int  # of the prompt in the request
    token_id: int
    text: str  # the text that is final now; often ""
    finish_reason: Literal["stop", "length"] | None  # None while more follows
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache; set on the first token of a prompt


class GenerationState:
    """The generation of one prompt of a request.

    Args:
        index: the prompt's index in the request.
        prompt: token ids, not empty.
        sampling: the settings of the request.
        context_left: tokens that the context has room for after the prompt.
        eos_token_ids: the tokens that end a text.
        token_bytes: of the tokenizer.

    Attributes:
        last_token: the newest token id.
        token_count: new tokens so far, at most `max_new_tokens`.
        finish_reason: "stop" after an end-of-text token or a stop string, "length" after the last token; else None.
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        context_left: int,
        eos_token_ids: set[int],
        token_bytes: TokenBytes,
    ) -> None:
        self.index, self.prompt, self.sampling = index, prompt, sampling
        self.finish_reason: Literal["stop", "length"] | None = None
        self.last_token = 0
        self.max_new_tokens = min(sampling.max_new_tokens, context_left)
        self.token_count = 0
        self._end_token_ids = (set() if sampling.ignore_eos else eos_token_ids) | set(sampling.stop_token_ids)
        self._constraint = sampling.constraint.start() if sampling.constraint else None
        self._sampler = Sampler(sampling, prompt, index)
        self._detokenizer = Detokenizer(token_bytes, prompt, sampling.stop, sampling.skip_special_tokens)

    def choose_token(self, logits: np.ndarray) -> TokenEvent:
        """Choose the next token from (V,) logits, and add it to the text."""
        self.last_token = token = self._sampler.choose(self._mask_forbidden(logits))
        self.token_count += 1
        ended = token in self._end_token_ids
        is_complete = not ended and self._constraint is not None and self._constraint.accept(token)
        text = "" if ended else self._detokenizer.add(token)
        if ended or is_complete or self._detokenizer.stopped:
            self.finish_reason = "stop"
        elif self.token_count >= self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self._detokenizer.finish()
            # The held-back rest may contain a stop string.
            self.finish_reason = "stop" if self._detokenizer.stopped else self.finish_reason
        if self.sampling.logprobs is None:
            return TokenEvent(self.index, token, text, self.finish_reason)
        logprobs = log_softmax(logits.astype(np.float64))
        top = top_tokens(logprobs, self.sampling.logprobs)
        return TokenEvent(self.index, token, text, self.finish_reason, float(logprobs[token]), top)

    def is_near_tie(self, logits: np.ndarray, distance: float) -> bool:
        """Whether greedy decoding has a choice between two tokens whose (V,) logits are closer than `distance`."""
        return self.sampling.temperature == 0 and self._sampler.is_near_tie(self._mask_forbidden(logits), distance)

    def _mask_forbidden(self, logits: np.ndarray) -> np.ndarray:
        """(V,) logits, -inf for the tokens that may not follow; does not change its argument."""
        if self._constraint is not None:
            logits = np.where(self._constraint.allowed_tokens(), logits, -np.inf)
        if self.token_count < self.sampling.min_tokens and self._end_token_ids:
            logits = logits.copy()
            logits[list(self._end_token_ids)] = -np.inf
        return logits
