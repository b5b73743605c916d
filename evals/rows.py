"""Requests laid out as rows of one forward pass after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

BATCH_TOKENS = 4096
MOST_LOGITS = 2**28  # of one batch (1 GB); a large vocabulary makes batches smaller

Scored = tuple[float, bool]  # summed log-probability in nats, and whether greedy decoding gives these tokens


class Forward(Protocol):
    """A model that gives log-probabilities of chosen tokens."""

    max_length: int
    vocab_size: int

    def logprobs(
        self, input_ids: np.ndarray, lengths: np.ndarray, row: np.ndarray, place: np.ndarray, token: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of N chosen tokens, each after the tokens of its row up to its place.

        Args:
            input_ids: (B, T) int64, padded on the right. lengths: (B,) int64, of the rows without padding.
            row, place, token: (N,) int64.

        Returns:
            (N,) float32 natural-log probabilities of `token`; (N,) bool, True where it is the likeliest.
        """


def scores(
    forward: Forward, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, Scored]]:
    """(index, score) of each (context, continuation) of token ids, batch by batch, longest first.

    Pairs with the same input share a row; that covers repeated requests and all one-token choices. What is
    longer than the context loses its beginning.

    Args:
        batch_tokens: the most tokens of one forward pass, padding included; a longer text runs alone.
    """
    batch_tokens = max(1, min(batch_tokens, MOST_LOGITS // forward.vocab_size))
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        # The last token is only predicted.
        inputs = (context + continuation)[-(forward.max_length + 1) :][:-1]
        rows.setdefault(tuple(inputs), []).append(index)
    for batch in batches(sorted(rows, key=lambda inputs: (-len(inputs), inputs)), batch_tokens):
        lengths = np.array([len(inputs) for inputs in batch])
        input_ids = np.zeros((len(batch), lengths.max()), np.int64)
        owners: list[int] = []
        row: list[int] = []
        place: list[int] = []
        token: list[int] = []
        for number, inputs in enumerate(batch):
            input_ids[number, : len(inputs)] = inputs
            for index in rows[inputs]:
                continuation = pairs[index][1]
                row += [number] * len(continuation)
                place += range(len(inputs) - len(continuation), len(inputs))
                token += continuation
                owners.append(index)
        logprobs, greedy = forward.logprobs(
            input_ids, lengths, *(np.array(values, np.int64) for values in (row, place, token))
        )
        end = 0
        for index in owners:
            start, end = end, end + len(pairs[index][1])
            yield index, (float(logprobs[start:end].sum(dtype=np.float64)), bool(greedy[start:end].all()))


def batches(rows: Sequence[Any], batch_tokens: int, more: int = 0) -> Iterator[Sequence[Any]]:
    """Rows, longest first, in batches of at most `batch_tokens`, `more` tokens added to each row."""
    start = 0
    while start < len(rows):
        size = max(1, batch_tokens // (len(rows[start]) + more))
        yield rows[start : start + size]
        start += size
