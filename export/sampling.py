"""How the next token is chosen from the logits. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from registry.errors import BadInput


@dataclass(frozen=True)
class Sampling:
    """What a request asks of generation; names and meaning as in transformers' `generate`.

    Raises BadInput for a value out of its range.
    """

    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()  # generation ends before the first of these strings
    logprobs: int | None = None  # report the chosen token's, and this many of the likeliest at each step
    ignore_eos: bool = False  # go on after an end-of-text token: costs are measured over a known length

    def __post_init__(self) -> None:
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", np.isfinite(self.temperature) and self.temperature >= 0, "0 or greater"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed is None or self.seed >= 0, "0 or greater"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a list of non-empty strings"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or greater"),
        ]
        for name, holds, wanted in rules:
            if not holds:
                raise BadInput(f"{name} is {getattr(self, name)!r}; it must be {wanted}")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., V) logits -> (..., V) natural-log probabilities, of the same dtype."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def likeliest(logprobs: np.ndarray, count: int) -> dict[int, float]:
    """The `count` likeliest tokens of (V,) log-probabilities, best first, with theirs."""
    best = np.argsort(-logprobs, kind="stable")[:count]
    return {int(token): float(logprobs[token]) for token in best}


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """(V,) logits -> (V,) float64 probabilities after temperature, top-k and top-p, as transformers."""
    scores = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scores):
        least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores = np.where(scores < least, -np.inf, scores)
    probabilities = np.exp(log_softmax(scores))
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(probabilities, kind="stable")
        tail = order[np.cumsum(probabilities[order]) <= 1 - sampling.top_p]
        probabilities[tail[tail != order[-1]]] = 0
        probabilities /= probabilities.sum()
    return probabilities


def choose(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """The next token's id for (V,) logits: the likeliest at temperature 0, else a draw."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    cumulative = np.cumsum(distribution(logits, sampling))
    # Scaled by the sum, which rounding may leave a hair off 1.
    return int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
