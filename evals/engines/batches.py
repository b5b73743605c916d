"""Requests laid out as rows of one forward pass after the other, each distinct prefix once where the model allows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Protocol

import numpy as np

from limbeck.evals.engines.prefix_tree import MIN_TOKENS_BELOW_TRUNK, Group, Inputs, Row
from limbeck.registry.core.errors import BadInput

BATCH_TOKENS = 4096
CPU_TOKENS = 1024  # of a batch: attention scores of more leave a processor's cache, and take longer
MAX_LOGITS = 2**28  # of one batch (1 GB); a large vocabulary makes batches smaller
MAX_ATTENTION_PAIRS = 2**23  # of tokens that attend to each other in one batch, for each head
MAX_PADDING_SHARE = 0.1  # of a row: a shorter one waits for the next batch
MAX_CACHE_FACTOR = 8  # times the tokens of a batch: the trunk's keys and values, once for each row
MAX_SHARED_WORK = 0.97  # of the tokens: sharing has to save more than the rest of them

TokenPair = tuple[list[int], list[int]]  # token ids of a context and its continuation
ContinuationScore = tuple[float, bool]  # summed log-probability in nats, and whether greedy decoding gives these tokens


@dataclass(frozen=True)
class Batch:
    """What one forward pass runs, and which log-probabilities it is to give.

    Attributes:
        tokens: (B, T) int64, padded on the right. lengths: (B,) int64, of the rows without padding.
        start: the tokens of the trunk above all rows.
        depth: (B, T) int64, the place of each token in its text, and mask: (B, T, T) bool, which tokens of its
            row each token attends to, beside all of the trunk. None: each row is a chain from `start` on.
        flat: (M,) int64, indices in the flattened `tokens`, at least one: after these something is predicted.
        node: (N,) int64, indices in `flat`, and token: (N,) int64: the tokens predicted there.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    start: int
    depth: np.ndarray | None
    mask: np.ndarray | None
    logit_positions: np.ndarray
    logit_rows: np.ndarray
    target_tokens: np.ndarray


@dataclass
class TokenCounter:
    """Tokens that a model ran, padding included, and the least possible: each distinct prefix once."""

    tokens_run: int = 0
    min_tokens: int = 0


class Forward(Protocol):
    """A model that gives log-probabilities of chosen tokens.

    Attributes:
        max_length: the context in tokens. vocab_size: the width of the logits.
        work: counts what `scores` ran.
    """

    max_length: int
    vocab_size: int
    work: TokenCounter

    def max_shared_tokens(self, tokens: int) -> int:
        """The most tokens, about `tokens` or fewer, of a row and its trunk that give what plain rows give."""

    def run(self, batch: Batch, trunk: Any = None, keep_trunk: bool = False) -> tuple[np.ndarray, np.ndarray, Any]:
        """Log-probabilities of the N chosen tokens of a batch.

        Args:
            trunk: what `run` gave for the trunk above, with `keep_trunk`.
            keep_trunk: give the trunk that this batch of one chain is, with the one above.

        Returns:
            (N,) float32 natural-log probabilities of `token`; (N,) bool, True where it is the likeliest; the
            trunk, None without `keep_trunk`.
        """


class NanLogits(BadInput):
    """A pair or prompt after which the logits are NaN, by its index; what is made of them may look fine."""

    def __init__(self, index: int) -> None:
        super().__init__(
            "the model gives NaN (no number) for a token's probability",
            fix="its weights are damaged or overflow: look at how it was trained or exported",
        )
        self.index = index


def score_pairs(
    forward: Forward, pairs: Sequence[TokenPair], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, ContinuationScore]]:
    """(index, score) of each (context, continuation) of token ids, in the order they are finished.

    What inputs have in common from the first token on runs once, where `forward.reach` allows it. What is longer
    than the context loses its beginning.

    Args:
        batch_tokens: the most tokens of one forward pass, padding included; a longer text runs alone.

    Raises:
        NotANumber: a log-probability that is none.
    """
    requests = Requests(pairs, forward.max_length)
    forward.work.min_tokens += requests.inputs.min_tokens
    return run_groups(forward, requests, plan_groups(forward, requests.inputs, batch_tokens), batch_tokens)


class Requests:
    """Pairs by their distinct inputs.

    Attributes:
        pairs: as given. inputs: without repetition. owners: the pairs of each input.
    """

    def __init__(self, pairs: Sequence[TokenPair], max_length: int) -> None:
        self.pairs = pairs
        owners: dict[bytes, list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            # The last token is only predicted. Big-endian bytes sort as the tokens do.
            tokens = (context + continuation)[-(max_length + 1) :][:-1]
            owners.setdefault(np.array(tokens, ">u4").tobytes(), []).append(index)
        order = sorted(owners)
        self.inputs = Inputs([np.frombuffer(key, ">u4").astype(np.int64) for key in order])
        self.owners = [owners[key] for key in order]

    def find_targets(self, row: Row) -> RowTargets:
        """A row with what its pairs want of it."""
        found = [np.empty((3, 0), np.int64)]
        for name, path in row.paths:
            for pair in self.owners[name]:
                continuation = self.pairs[pair][1]
                # Where the first token is predicted, on this row's path; below 0 in the trunk above.
                first = int(self.inputs.lengths[name]) - len(continuation) - row.start
                nodes = path[max(first, 0) :]
                tokens = continuation[max(-first, 0) :][: len(nodes)]
                if tokens:
                    found.append(np.stack([nodes[: len(tokens)], np.full(len(tokens), pair), np.array(tokens)]))
        return RowTargets(row, *np.concatenate(found, axis=1))


@dataclass(frozen=True)
class RowTargets:
    """A row, and the tokens that are predicted in it: N nodes, the pair and the token each is for."""

    row: Row
    positions: np.ndarray
    pair_indices: np.ndarray
    target_tokens: np.ndarray


def plan_groups(forward: Forward, inputs: Inputs, batch_tokens: int) -> list[Group]:
    """Rows that share prefixes, if that saves enough and the model gives the same numbers so; else chains."""
    if inputs.min_tokens > MAX_SHARED_WORK * inputs.lengths.sum():
        return inputs.chains()
    most, below = min(batch_tokens, isqrt(MAX_ATTENTION_PAIRS)), min(MIN_TOKENS_BELOW_TRUNK, batch_tokens)
    groups = inputs.forest(most, sys.maxsize, below)
    wanted = max(group.depth + len(row.tokens) for group in groups for row in group.rows)
    reach = forward.max_shared_tokens(wanted)
    return groups if reach >= wanted else inputs.forest(most, reach, below)


def run_groups(
    forward: Forward, requests: Requests, groups: Sequence[Group], batch_tokens: int
) -> Iterator[tuple[int, ContinuationScore]]:
    """(index, score) of each pair, by way of the rows of these groups."""
    total = np.zeros(len(requests.pairs))
    greedy = np.ones(len(requests.pairs), bool)
    left = np.array([len(continuation) for _, continuation in requests.pairs])

    def step(
        rows: Sequence[RowTargets], trunk: Any, keep: bool = False
    ) -> tuple[Any, list[tuple[int, ContinuationScore]]]:
        batch = assemble_batch(rows)
        pair = np.concatenate([row.pair_indices for row in rows])
        logprobs, likeliest, trunk = forward.run(batch, trunk, keep)
        forward.work.tokens_run += batch.tokens.size
        if np.isnan(logprobs).any():
            raise NanLogits(int(pair[np.isnan(logprobs)][0]))
        np.add.at(total, pair, logprobs)
        np.logical_and.at(greedy, pair, likeliest)
        np.subtract.at(left, pair, 1)
        finished = [index for index in np.unique(pair).tolist() if left[index] == 0]
        return trunk, [(index, (float(total[index]), bool(greedy[index]))) for index in finished]

    above: list[tuple[int, Any]] = []  # groups whose trunks are above the next one, and what `run` gave for them
    for number, group in enumerate(groups):
        while above and above[-1][0] != group.parent:
            above.pop()
        trunk = above[-1][1] if above else None
        if group.trunk is not None:
            trunk, finished = step([requests.find_targets(group.trunk)], trunk, keep=True)
            yield from finished
        above.append((number, trunk))
        for rows in split_rows_into_batches(
            [requests.find_targets(row) for row in group.rows], batch_tokens, forward.vocab_size
        ):
            yield from step(rows, trunk)[1]


def split_rows_into_batches(
    rows: Sequence[RowTargets], batch_tokens: int, vocab_size: int
) -> Iterator[list[RowTargets]]:
    """Rows with one trunk in batches, longest first: chains by themselves, and none much shorter than the longest."""
    batch: list[RowTargets] = []
    wanted = 0
    for row in sorted(rows, key=lambda row: (row.row.is_chain, -len(row.row.tokens))):
        wanted += len(np.unique(row.positions))
        if batch:
            longest, count = len(batch[0].row.tokens), len(batch) + 1
            total = row.row.start + longest
            if (
                row.row.is_chain != batch[0].row.is_chain
                or len(row.row.tokens) < (1 - MAX_PADDING_SHARE) * longest
                or count * longest > batch_tokens
                or count * longest * total > MAX_ATTENTION_PAIRS
                or count * total > MAX_CACHE_FACTOR * batch_tokens
                or wanted * vocab_size > MAX_LOGITS
            ):
                yield batch
                batch, wanted = [], len(np.unique(row.positions))
        batch.append(row)
    if batch:
        yield batch


def assemble_batch(rows: Sequence[RowTargets]) -> Batch:
    """Rows as one batch, padded on the right; padding attends to itself."""
    lengths = np.array([len(row.row.tokens) for row in rows])
    count, width, start = len(rows), int(lengths.max()), rows[0].row.start
    tokens = np.zeros((count, width), np.int64)
    tree = not all(row.row.is_chain for row in rows)
    depth = np.zeros((count, width), np.int64) if tree else None
    mask = np.broadcast_to(np.eye(width, dtype=bool), (count, width, width)).copy() if tree else None
    for number, (filled, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens[number, :length] = filled.row.tokens
        if depth is not None and mask is not None:
            depth[number, :length] = filled.row.depth
            mask[number, :length, :length] = filled.row.mask()
    places = np.concatenate([number * width + filled.positions for number, filled in enumerate(rows)])
    flat, node = np.unique(places, return_inverse=True)
    token = np.concatenate([filled.target_tokens for filled in rows])
    return Batch(tokens, lengths, start, depth, mask, flat if len(flat) else np.zeros(1, np.int64), node, token)


def split_by_tokens(rows: Sequence[Any], batch_tokens: int, more: int = 0) -> Iterator[Sequence[Any]]:
    """Rows, longest first, in batches of at most `batch_tokens`, `more` tokens added to each row."""
    start = 0
    while start < len(rows):
        size = max(1, batch_tokens // (len(rows[start]) + more))
        yield rows[start : start + size]
        start += size
