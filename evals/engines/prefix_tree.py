"""Requests as a tree of tokens, so that a model runs each distinct prefix once.

In sorted order, neighbours share their longest common prefix: that gives the tree. It is cut into *rows*. A row is a
part of the tree in depth-first order, in which each token attends to its ancestors only (tree attention, as in
SpecInfer, arXiv 2305.09781). A prefix with more tokens below it than a few rows hold is a *trunk*: it runs alone, and
its keys and values are passed to the rows below. This module does not know the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

# The size of a row that can be cut: in longer rows attention to masked tokens costs more than sharing saves.
ROW_TOKENS = 256
MAX_REPEATED_SHARE = 0.04  # of a row: a cut is cheap if neighbours share no more than this
MIN_TRUNK_TOKENS = 32  # repeating a shorter prefix is faster than running it alone
MIN_TOKENS_BELOW_TRUNK = 4 * ROW_TOKENS  # tokens below a prefix that make it a trunk


@dataclass(frozen=True)
class Row:
    """A part of the tree, as one row of T tokens.

    Attributes:
        tokens: (T,) int64, in depth-first order.
        depth: (T,) int64, the position of each token in its text.
        start: the depth of the first token, which is the length of the trunk above.
        paths: (input, indices in `tokens` of its tokens from `start` on) of each input in this row.
    """

    tokens: np.ndarray
    depth: np.ndarray
    start: int
    paths: list[tuple[int, np.ndarray]]

    @property
    def is_chain(self) -> bool:
        """Whether the row is one text without a fork, for which plain causal attention is correct."""
        return bool(self.depth[-1] - self.start + 1 == len(self.tokens))

    def mask(self) -> np.ndarray:
        """(T, T) bool: [i, j] is True if token j is token i or an ancestor of it."""
        mask = np.eye(len(self.tokens), dtype=bool)
        done = 0
        for _, path in self.paths:
            end = int(path[-1]) + 1 if len(path) else done
            if end > done:  # the new tokens of a path are consecutive, at its end
                new = end - done
                mask[done:end, path[:-new]] = True
                mask[done:end, done:end] |= np.tri(new, dtype=bool)
                done = end
        return mask


@dataclass
class Group:
    """Rows with the same trunk above them.

    Attributes:
        trunk: the last part of the trunk; None at the root.
        parent: the index of the group whose trunk is above this part; -1 if none is.
        rows: the rows below the trunk.
    """

    trunk: Row | None = None
    parent: int = -1
    rows: list[Row] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Tokens above the rows."""
        return self.trunk.start + len(self.trunk.tokens) if self.trunk else 0


class Inputs:
    """N distinct inputs of a model, sorted.

    Attributes:
        tokens: N arrays, (T,) int64 each.
        names: the number of each input in the rows' paths.
        lengths: (N,) int64, in tokens.
        common: (N,) int64, the tokens that each input shares with the one before it.
        min_tokens: the fewest tokens that a model must run: one for each distinct prefix.
    """

    def __init__(self, tokens: Sequence[np.ndarray], names: Sequence[int] | None = None) -> None:
        self.tokens = tokens
        self.names = range(len(tokens)) if names is None else names
        self.lengths = np.array([len(text) for text in tokens])
        shared = [common_prefix_length(*neighbours) for neighbours in pairwise(tokens)]
        self.common = np.array([0, *shared][: len(tokens)])
        self.min_tokens = int((self.lengths - self.common).sum())

    def chains(self) -> list[Group]:
        """Each input as a row of its own; nothing is shared."""
        return [Group(rows=[self._chain(index, 0, len(text), [index]) for index, text in enumerate(self.tokens)])]

    def forest(
        self,
        max_row_tokens: int,
        max_shared_tokens: int,
        min_below: int = MIN_TOKENS_BELOW_TRUNK,
        min_trunk: int = MIN_TRUNK_TOKENS,
    ) -> list[Group]:
        """The rows of the tree, grouped by trunk; a trunk comes before the groups below it.

        Args:
            max_row_tokens: the most tokens of a row; a single longer text is a row of its own.
            max_shared_tokens: the most tokens of a row and the trunk above it; a longer text shares nothing.
            min_below: the fewest tokens below a trunk. Fewer suffice if trunk and all below it exceed
                `max_row_tokens`: otherwise several rows would each repeat the trunk.
            min_trunk: the fewest tokens of a trunk.
        """
        if (self.lengths > max_shared_tokens).any():
            short = self._subset(self.lengths <= max_shared_tokens)
            long = self._subset(self.lengths > max_shared_tokens)
            return [*short.forest(max_row_tokens, max_shared_tokens, min_below, min_trunk), *long.chains()]
        groups = [Group()]
        owner = np.zeros(len(self.tokens), int)
        above = [(0, len(self.tokens), 0)]  # (group, end of its inputs, depth), outermost first
        for start, end, depth, below in self._forks():
            while above[-1][1] <= start:
                above.pop()
            parent, _, top = above[-1]
            is_long = depth - top >= max(min_trunk, top // 8)
            if is_long and (below >= min_below or depth - top + below > max_row_tokens):
                above.append((len(groups), end, depth))
                owner[start:end] = len(groups)
                groups.append(Group(self._chain(start, top, depth, range(start, end)), parent))
        order = np.argsort(owner, kind="stable")
        ends = np.cumsum(np.bincount(owner, minlength=len(groups)))
        for group, members in zip(groups, np.split(order, ends[:-1]), strict=True):
            room = min(max_row_tokens, max_shared_tokens - group.depth)
            group.rows = list(self._pack(members.tolist(), group.depth, room))
        return groups

    def _subset(self, chosen: np.ndarray) -> Inputs:
        members = np.flatnonzero(chosen).tolist()
        return Inputs([self.tokens[index] for index in members], [self.names[index] for index in members])

    def _forks(self) -> list[tuple[int, int, int, int]]:
        """(start, end, depth, tokens below) of each fork, outermost first; its inputs are those from start to end."""
        new_tokens = [0, *np.cumsum(self.lengths - self.common).tolist()]
        forks = []
        open_: list[tuple[int, int]] = []  # (start, depth), depths ascending
        for index, depth in enumerate([*self.common[1:].tolist(), 0], 1):
            start = index - 1
            while open_ and open_[-1][1] > depth:
                start, closed = open_.pop()
                # What the first input has below the fork, plus the new tokens of each of the others.
                below = new_tokens[index] - new_tokens[start + 1] + int(self.lengths[start]) - closed
                forks.append((start, index, closed, below))
            if depth and (not open_ or open_[-1][1] < depth):
                open_.append((start, depth))
        return sorted(forks, key=lambda fork: (fork[0], -fork[1]))

    def _pack(self, members: Sequence[int], start: int, max_row_tokens: int) -> Iterator[Row]:
        """Rows of these inputs, in order. A row ends if it is full, or if the next input shares little with it."""
        row = _RowBuilder(start)
        previous = 0
        for index in members:
            if self.lengths[index] == start:
                continue  # the trunk has the whole input
            common = max(start, int(self.common[previous + 1 : index + 1].min())) if row.size else start
            size = row.size + int(self.lengths[index]) - common
            cheap = common - start <= MAX_REPEATED_SHARE * row.size
            if row.size and (size > max_row_tokens or (size > ROW_TOKENS and cheap)):
                yield row.build()
                row, common = _RowBuilder(start), start
            row.add(self.names[index], self.tokens[index], common)
            previous = index
        if row.size:
            yield row.build()

    def _chain(self, index: int, start: int, end: int, members: Iterable[int]) -> Row:
        """The tokens from `start` to `end` of one input, which all `members` share."""
        path = np.arange(end - start)
        return Row(
            self.tokens[index][start:end], path + start, start, [(self.names[member], path) for member in members]
        )


class _RowBuilder:
    """Builds one row, input by input."""

    def __init__(self, start: int) -> None:
        self.start, self.size = start, 0
        self.path = np.empty(0, int)  # of the input added last
        self.tokens: list[np.ndarray] = []
        self.depth: list[np.ndarray] = []
        self.paths: list[tuple[int, np.ndarray]] = []

    def add(self, name: int, tokens: np.ndarray, common: int) -> None:
        """Add an input that shares its first `common` tokens with the one before."""
        new = np.arange(self.size, self.size + len(tokens) - common)
        self.tokens.append(tokens[common:])
        self.depth.append(np.arange(common, len(tokens)))
        self.path = np.concatenate([self.path[: common - self.start], new])
        self.paths.append((name, self.path))
        self.size += len(new)

    def build(self) -> Row:
        return Row(np.concatenate(self.tokens), np.concatenate(self.depth), self.start, self.paths)


def common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """The length of the longest common prefix of two inputs."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length
