"""Scores requests in batches of rows, one forward pass each; runs each distinct prefix once if the model allows it."""

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
CPU_TOKENS = 1024  # of a batch on a CPU: with more, attention scores no longer fit in the processor's cache
MAX_LOGITS = 2**28  # of one batch (1 GB); a large vocabulary makes batches smaller
MAX_ATTENTION_PAIRS = 2**23  # of tokens that attend to each other in one batch, per head
MAX_PADDING_SHARE = 0.1  # of a row: a row with more padding starts the next batch
MAX_CACHE_FACTOR = 8  # times the tokens of a batch: limits the trunk's keys and values, repeated for each row
MAX_SHARED_WORK = 0.97  # of all tokens: prefixes are shared only if fewer tokens than this are run

TokenPair = tuple[list[int], list[int]]  # token ids of a context and its continuation
ContinuationScore = tuple[float, bool]  # summed log-probability in nats; whether greedy decoding gives these tokens


@dataclass(frozen=True)
class Batch:
    """One forward pass: its input, and the log-probabilities to return.

    B rows of T tokens, M positions after which something is predicted, N predictions.

    Attributes:
        tokens: (B, T) int64, padded on the right.
        lengths: (B,) int64, of the rows without padding.
        start: the number of tokens of the trunk above all rows.
        depth: (B, T) int64, the position of each token in its text; None if each row is a chain from `start` on.
        mask: (B, T, T) bool, which tokens of its row each token attends to, besides the whole trunk; None for chains.
        logit_positions: (M,) int64, indices in the flattened `tokens`; at least one.
        logit_rows: (N,) int64, indices in `logit_positions`.
        target_tokens: (N,) int64, the token predicted there.
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
    """Counts the tokens that a model ran, padding included, and the minimum: each distinct prefix once."""

    tokens_run: int = 0
    min_tokens: int = 0


class Forward(Protocol):
    """A model that computes log-probabilities of given tokens.

    Attributes:
        max_length: the context in tokens.
        vocab_size: the width of the logits.
        work: counts the tokens that `run_groups` ran.
    """

    max_length: int
    vocab_size: int
    work: TokenCounter

    def max_shared_tokens(self, tokens: int) -> int:
        """The largest row with its trunk, in tokens, whose numbers equal those of plain rows.

        Args:
            tokens: the largest size of interest; the result may be somewhat larger.
        """

    def run(self, batch: Batch, trunk: Any = None, keep_trunk: bool = False) -> tuple[np.ndarray, np.ndarray, Any]:
        """Run one batch.

        Args:
            trunk: the third result of `run` for the trunk above, with `keep_trunk`.
            keep_trunk: return the keys and values of this batch, a single chain, and of the trunk above it.

        Returns:
            (N,) float32 natural-log probabilities of `target_tokens`; (N,) bool, whether each is the likeliest token;
            the trunk, None without `keep_trunk`.
        """


class NanLogits(BadInput):
    """The logits after a pair or prompt are NaN. `index` is its index. Text generated from them may look fine."""

    def __init__(self, index: int) -> None:
        super().__init__(
            "the model gives NaN as a token's probability",
            fix="its weights are damaged or overflow: check how it was trained or exported",
        )
        self.index = index


def score_pairs(
    forward: Forward, pairs: Sequence[TokenPair], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, ContinuationScore]]:
    """(index, score) of each (context, continuation) of token ids, in the order in which they are finished.

    A common prefix of inputs runs once if `forward.max_shared_tokens` allows it. An input that is longer than the
    context loses its beginning.

    Args:
        batch_tokens: the most tokens of one forward pass, padding included; a longer text runs alone.

    Raises:
        NanLogits: a log-probability is NaN.
    """
    requests = Requests(pairs, forward.max_length)
    forward.work.min_tokens += requests.inputs.min_tokens
    return run_groups(forward, requests, plan_groups(forward, requests.inputs, batch_tokens), batch_tokens)


class Requests:
    """Pairs, grouped by their distinct inputs.

    Attributes:
        pairs: as given.
        inputs: the distinct inputs, sorted.
        owners: the indices of the pairs of each input.
    """

    def __init__(self, pairs: Sequence[TokenPair], max_length: int) -> None:
        self.pairs = pairs
        owners: dict[bytes, list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            # The last token is predicted, not read. Big-endian bytes sort like the tokens.
            tokens = (context + continuation)[-(max_length + 1) :][:-1]
            owners.setdefault(np.array(tokens, ">u4").tobytes(), []).append(index)
        order = sorted(owners)
        self.inputs = Inputs([np.frombuffer(key, ">u4").astype(np.int64) for key in order])
        self.owners = [owners[key] for key in order]

    def find_targets(self, row: Row) -> RowTargets:
        """A row, and the tokens that its pairs predict in it."""
        targets = [np.empty((3, 0), np.int64)]
        for name, path in row.paths:
            for pair in self.owners[name]:
                continuation = self.pairs[pair][1]
                # The index on this row's path after which the first token is predicted; below 0 in the trunk above.
                first = int(self.inputs.lengths[name]) - len(continuation) - row.start
                nodes = path[max(first, 0) :]
                tokens = continuation[max(-first, 0) :][: len(nodes)]
                if tokens:
                    targets.append(np.stack([nodes[: len(tokens)], np.full(len(tokens), pair), np.array(tokens)]))
        return RowTargets(row, *np.concatenate(targets, axis=1))


@dataclass(frozen=True)
class RowTargets:
    """A row and the tokens that are predicted in it.

    Attributes:
        positions: (N,) int64, indices in the row's tokens.
        pair_indices: (N,) int64, the pair of each prediction.
        target_tokens: (N,) int64, the predicted tokens.
    """

    row: Row
    positions: np.ndarray
    pair_indices: np.ndarray
    target_tokens: np.ndarray


def plan_groups(forward: Forward, inputs: Inputs, batch_tokens: int) -> list[Group]:
    """Rows that share prefixes if that saves enough and does not change the model's numbers; else chains."""
    if inputs.min_tokens > MAX_SHARED_WORK * inputs.lengths.sum():
        return inputs.chains()
    max_row_tokens = min(batch_tokens, isqrt(MAX_ATTENTION_PAIRS))
    min_below = min(MIN_TOKENS_BELOW_TRUNK, batch_tokens)
    groups = inputs.forest(max_row_tokens, sys.maxsize, min_below)
    largest = max(group.depth + len(row.tokens) for group in groups for row in group.rows)
    max_shared_tokens = forward.max_shared_tokens(largest)
    return groups if max_shared_tokens >= largest else inputs.forest(max_row_tokens, max_shared_tokens, min_below)


def run_groups(
    forward: Forward, requests: Requests, groups: Sequence[Group], batch_tokens: int
) -> Iterator[tuple[int, ContinuationScore]]:
    """(index, score) of each pair, from running the rows of these groups."""
    total = np.zeros(len(requests.pairs))
    greedy = np.ones(len(requests.pairs), bool)
    remaining = np.array([len(continuation) for _, continuation in requests.pairs])

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
        np.subtract.at(remaining, pair, 1)
        finished = [index for index in np.unique(pair).tolist() if remaining[index] == 0]
        return trunk, [(index, (float(total[index]), bool(greedy[index]))) for index in finished]

    above: list[tuple[int, Any]] = []  # the groups above the next one, and their trunks from `run`
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
    """Batches of rows with one trunk, longest first. Chains do not share a batch with other rows."""
    batch: list[RowTargets] = []
    positions = 0  # of the batch, after which logits are computed
    for row in sorted(rows, key=lambda row: (row.row.is_chain, -len(row.row.tokens))):
        if batch and not _fits(row, batch, batch_tokens, max_positions=MAX_LOGITS // vocab_size - positions):
            yield batch
            batch, positions = [], 0
        batch.append(row)
        positions += len(np.unique(row.positions))
    if batch:
        yield batch


def _fits(row: RowTargets, batch: Sequence[RowTargets], batch_tokens: int, max_positions: int) -> bool:
    """Whether a row may join a batch, which begins with its longest row."""
    longest, count = len(batch[0].row.tokens), len(batch) + 1
    total = row.row.start + longest
    return (
        row.row.is_chain == batch[0].row.is_chain
        and len(row.row.tokens) >= (1 - MAX_PADDING_SHARE) * longest
        and count * longest <= batch_tokens
        and count * longest * total <= MAX_ATTENTION_PAIRS
        and count * total <= MAX_CACHE_FACTOR * batch_tokens
        and len(np.unique(row.positions)) <= max_positions
    )


def assemble_batch(rows: Sequence[RowTargets]) -> Batch:
    """Rows as one batch, padded on the right. Padding attends to itself."""
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
    positions = np.concatenate([number * width + filled.positions for number, filled in enumerate(rows)])
    logit_positions, logit_rows = np.unique(positions, return_inverse=True)
    return Batch(
        tokens=tokens,
        lengths=lengths,
        start=start,
        depth=depth,
        mask=mask,
        logit_positions=logit_positions if len(logit_positions) else np.zeros(1, np.int64),
        logit_rows=logit_rows,
        target_tokens=np.concatenate([filled.target_tokens for filled in rows]),
    )


def split_by_tokens(rows: Sequence[Any], batch_tokens: int, new_tokens: int = 0) -> Iterator[Sequence[Any]]:
    """Split rows, sorted longest first, into batches of at most `batch_tokens`, with `new_tokens` more in each row."""
    start = 0
    while start < len(rows):
        size = max(1, batch_tokens // (len(rows[start]) + new_tokens))
        yield rows[start : start + size]
        start += size
