"""Sampling: penalties, temperature, top-k, top-p and min-p, from logits to the next token. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from limbeck.registry.core.errors import BadInput


class NonFiniteLogits(BadInput):
    """The highest logit of a token is NaN or infinite."""


class TextConstraint(Protocol):
    """What may follow in one text, for example so that it becomes JSON (limbeck.export.runtime.text.constraint)."""

    def allowed_tokens(self) -> np.ndarray:
        """(V,) bool: the tokens that may follow, at least one."""

    def accept(self, token: int) -> bool:
        """Append an allowed token that is not an end-of-text token; return whether the text is complete."""


class Constraint(Protocol):
    """A compiled constraint, which any number of texts can have."""

    def start(self) -> TextConstraint:
        """The constraint of a new, empty text."""


@dataclass(frozen=True)
class Sampling:
    """The settings of generation; names and meanings as in transformers' `generate`.

    `presence_penalty`, `frequency_penalty` and `logit_bias` are as in OpenAI's API. `Runtime.start_generation` checks
    the token ids of `logit_bias` against the vocabulary.

    Raises:
        BadInput: a value out of its range.
    """

    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None  # a share of the most likely token's probability
    repetition_penalty: float = 1.0  # for tokens of the prompt and of the generated text
    presence_penalty: float = 0.0  # subtracted from the logit of each token in the generated text
    frequency_penalty: float = 0.0  # subtracted once for each occurrence in the generated text
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> value added to its logit
    seed: int | None = None
    stop: Sequence[str] = ()  # the text ends before the first occurrence of any of these
    logprobs: int | None = (
        None  # report the log-probability of each token and of this many most likely ones; None: none
    )
    ignore_eos: bool = False  # continue after an end-of-text token, to measure cost over a fixed length
    min_tokens: int = 0  # no end-of-text token and none of `stop_token_ids` before so many tokens
    stop_token_ids: Sequence[int] = ()  # these end the text as end-of-text tokens do, also with `ignore_eos`
    skip_special_tokens: bool = True  # leave special tokens out of the text
    constraint: Constraint | None = None  # what the text may be

    def __post_init__(self) -> None:
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", np.isfinite(self.temperature) and self.temperature >= 0, "0 or greater"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("presence_penalty", abs(self.presence_penalty) <= 1000, "-1000 to 1000"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 1000, "-1000 to 1000"),
            (
                "logit_bias",
                all(token >= 0 and abs(bias) <= 1000 for token, bias in self.logit_bias.items()),
                "token ids with a number from -1000 to 1000 each",
            ),
            ("seed", self.seed is None or self.seed >= 0, "0 or greater"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a list of non-empty strings"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or greater"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_new_tokens, f"0 to {self.max_new_tokens} (max_new_tokens)"),
        ]
        for name, is_valid, requirement in rules:
            if not is_valid:
                raise BadInput(f"{name} is {getattr(self, name)!r}; it must be {requirement}")


class Sampler:
    """Chooses the tokens of one text.

    The draws depend on the seed and on the prompt's index in the request, not on the rest of the batch.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], index: int) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(None if sampling.seed is None else [sampling.seed, index])
        self._seen = dict.fromkeys(prompt) if sampling.repetition_penalty != 1 else {}  # its keys are an ordered set
        self._counts: dict[int, int] = {}  # token id -> occurrences in the generated text

    def choose(self, logits: np.ndarray) -> int:
        """Choose the next token id from (V,) logits: the most likely one at temperature 0, else a random draw.

        Raises NonFiniteLogits if a logit is NaN or infinite; -inf is a token that may not follow.
        """
        sampling = self._sampling
        logits = self._penalized(logits)
        if sampling.temperature == 0:
            token = int(logits.argmax())  # NaN is the largest
            _check_highest(logits[token])
        else:
            tokens, probabilities = candidates(logits, sampling)
            cumulative = np.cumsum(probabilities)
            # Scaled by the sum, which rounding may make slightly different from 1.
            place = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
            token = int(tokens[place])
        if sampling.repetition_penalty != 1:
            self._seen[token] = None
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def is_near_tie(self, logits: np.ndarray, distance: float) -> bool:
        """Whether the two highest of (V,) logits, after bias and penalties, are closer than `distance`."""
        logits = self._penalized(logits).copy()
        best = logits.argmax()
        highest, logits[best] = logits[best], -np.inf
        return not highest - logits.max() >= distance  # True for NaN

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        """(V,) logits after bias and penalties; does not change its argument."""
        sampling = self._sampling
        if not (sampling.logit_bias or self._seen or self._counts):
            return logits
        logits = logits.astype(np.float64)
        logits[list(sampling.logit_bias)] += list(sampling.logit_bias.values())
        if self._seen:
            tokens, penalty = list(self._seen), sampling.repetition_penalty
            logits[tokens] *= np.where(logits[tokens] < 0, penalty, 1 / penalty)
        if self._counts:
            counts = np.array(list(self._counts.values()))
            logits[list(self._counts)] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., V) logits -> (..., V) natural-log probabilities, of the same dtype."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top_tokens(logprobs: np.ndarray, count: int) -> dict[int, float]:
    """The `count` most likely tokens of (V,) log-probabilities: token id -> log-probability, most likely first."""
    tokens = np.arange(len(logprobs)) if count >= len(logprobs) else indices_of_top(logprobs, count)
    best = tokens[np.argsort(-logprobs[tokens], kind="stable")[:count]]
    return {int(token): float(logprobs[token]) for token in best}


def indices_of_top(values: np.ndarray, count: int) -> np.ndarray:
    """Rising indices of the `count` largest of (V,) values; more than `count` if values are tied."""
    if count == 0:
        return np.zeros(0, np.int64)
    return np.flatnonzero(values >= np.partition(values, -count)[-count])


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens left after temperature, top-k, top-p and min-p, in this order as in transformers.

    Args:
        logits: (V,).
        sampling: its temperature must be above 0.

    Returns:
        (n,) token ids in rising order, and their (n,) float64 probabilities.

    Raises:
        BadInput: a logit is NaN or infinite.
    """
    scores = logits.astype(np.float64)
    _check_highest(scores.max())
    with np.errstate(over="ignore"):  # a tiny temperature leaves the most likely tokens: 0, and -inf for the others
        scores = (scores - scores.max()) / sampling.temperature
    tokens = np.arange(len(scores))
    if sampling.top_k is not None and sampling.top_k < len(scores):
        tokens = indices_of_top(scores, sampling.top_k)
        scores = scores[tokens]
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum()
    if sampling.top_p is not None and sampling.top_p < 1:
        kept = _nucleus(probabilities, sampling.top_p)
        tokens, probabilities = tokens[kept], probabilities[kept]
    if sampling.min_p:
        kept = probabilities >= sampling.min_p * probabilities.max()
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities / probabilities.sum()


def _check_highest(logit: float) -> None:
    if not np.isfinite(logit):
        raise NonFiniteLogits(f"the model returns no numbers: its highest logit is {logit}")


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Rising indices of the smallest set of most likely tokens whose probabilities sum to at least `top_p`."""
    count = 64
    while True:
        # Sort only as many as needed: sorting a whole vocabulary takes milliseconds.
        best = indices_of_top(probabilities, count) if count < len(probabilities) else np.arange(len(probabilities))
        best = best[np.argsort(-probabilities[best], kind="stable")]
        before = np.cumsum(probabilities[best]) - probabilities[best]
        if before[-1] + probabilities[best[-1]] >= top_p or len(best) == len(probabilities):
            return np.sort(best[(before < top_p) | (best == best[0])])
        count *= 8
