"""Requests as a tree of tokens, so that a model runs each distinct prefix once.

Sorted inputs give the tree: neighbours share their longest common prefix. It is cut into *rows*: a row is a
piece of the tree laid flat, its tokens in depth-first order, each of which attends to its ancestors alone (tree
attention, as in SpecInfer, arXiv 2305.09781). A prefix with more below it than a few rows hold is a *trunk*: it
runs alone, and its keys and values are handed to the rows below. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

ROW_TOKENS = (
    256  # tokens of a row, where it can be cut: beyond that attention to what is masked costs more than it saves
)
MAX_REPEATED_SHARE = 0.04  # of a row: a cut where neighbours share no more than this costs little
MIN_TRUNK_TOKENS = 32  # tokens: a shorter prefix is sooner repeated than run alone
MIN_TOKENS_BELOW_TRUNK = 4 * ROW_TOKENS  # tokens below a prefix that make it a trunk


@dataclass(frozen=True)
class Row:
    """A piece of the tree laid flat.

    Attributes:
        tokens, depth: (T,) int64, the tokens in depth-first order, and the place of each in its text.
        start: depth of the first token: the length of the trunk above.
        paths: inputs, and the indices in `tokens` of what each has here, from `start` on.
    """

    tokens: np.ndarray
    depth: np.ndarray
    start: int
    paths: list[tuple[int, np.ndarray]]

    @property
    def is_chain(self) -> bool:
        """One text without a fork: plain causal attention is right for it."""
        return bool(self.depth[-1] - self.start + 1 == len(self.tokens))

    def mask(self) -> np.ndarray:
        """(T, T) bool: True where the second is the first or an ancestor of it."""
        mask = np.eye(len(self.tokens), dtype=bool)
        done = 0
        for _, path in self.paths:
            end = int(path[-1]) + 1 if len(path) else done
            if end > done:  # what is new of a path is one run at its end
                new = end - done
                mask[done:end, path[:-new]] = True
                mask[done:end, done:end] |= np.tri(new, dtype=bool)
                done = end
        return mask


@dataclass
class Group:
    """Rows with the same trunk above them.

    Attributes:
        trunk: the last piece of it; None at the root. parent: index of the group whose trunk is above this piece.
    """

    trunk: Row | None = None
    parent: int = -1
    rows: list[Row] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Tokens above the rows."""
        return self.trunk.start + len(self.trunk.tokens) if self.trunk else 0


class Inputs:
    """Distinct inputs of a model, sorted, and what neighbours share.

    Attributes:
        tokens: (T,) int64 of each. names: what stands for each in the rows' paths.
        lengths: (N,) of each, and common: (N,) the tokens that each shares with the one before it.
        least: the fewest tokens that a model has to run: one for each distinct prefix.
    """

    def __init__(self, tokens: Sequence[np.ndarray], names: Sequence[int] | None = None) -> None:
        self.tokens = tokens
        self.names = range(len(tokens)) if names is None else names
        self.lengths = np.array([len(text) for text in tokens])
        neighbours = pairwise(tokens)
        self.common = np.array([0, *(common_prefix_length(*pair) for pair in neighbours)][: len(tokens)])
        self.min_tokens = int((self.lengths - self.common).sum())

    def chains(self) -> list[Group]:
        """Each input in a row of its own: nothing is shared."""
        return [Group(rows=[self._chain(index, 0, len(text), [index]) for index, text in enumerate(self.tokens)])]

    def forest(
        self,
        max_row_tokens: int,
        max_shared_tokens: int,
        min_below: int = MIN_TOKENS_BELOW_TRUNK,
        min_trunk: int = MIN_TRUNK_TOKENS,
    ) -> list[Group]:
        """Rows of the tree under their trunks; a trunk comes before what is below it.

        Args:
            max_row_tokens: the most tokens of a row, a single text aside.
            max_shared_tokens: the most tokens of a row and the trunk above it; a longer text shares nothing.
            min_below: the fewest tokens below a trunk, unless trunk and all below it exceed `max_row_tokens`: then they
                would be in several rows, and each would repeat it. shortest: the fewest tokens of a trunk.
        """
        if (self.lengths > max_shared_tokens).any():
            short, long = (
                self._subset(self.lengths <= max_shared_tokens),
                self._subset(self.lengths > max_shared_tokens),
            )
            return [*short.forest(max_row_tokens, max_shared_tokens, min_below, min_trunk), *long.chains()]
        groups = [Group()]
        owner = np.zeros(len(self.tokens), int)
        above = [(0, len(self.tokens), 0)]  # group, end of its inputs, depth
        for start, end, depth, hanging in self._forks():
            while above[-1][1] <= start:
                above.pop()
            parent, _, top = above[-1]
            if depth - top >= max(min_trunk, top // 8) and (
                hanging >= min_below or depth - top + hanging > max_row_tokens
            ):
                above.append((len(groups), end, depth))
                owner[start:end] = len(groups)
                groups.append(Group(self._chain(start, top, depth, range(start, end)), parent))
        order = np.argsort(owner, kind="stable")
        ends = np.cumsum(np.bincount(owner, minlength=len(groups)))
        for group, members in zip(groups, np.split(order, ends[:-1]), strict=True):
            group.rows = list(
                self._pack(members.tolist(), group.depth, min(max_row_tokens, max_shared_tokens - group.depth))
            )
        return groups

    def _subset(self, chosen: np.ndarray) -> Inputs:
        members = np.flatnonzero(chosen).tolist()
        return Inputs([self.tokens[index] for index in members], [self.names[index] for index in members])

    def _forks(self) -> list[tuple[int, int, int, int]]:
        """(start, end, depth, tokens below) of the inputs below each fork, outermost first."""
        own = [0, *np.cumsum(self.lengths - self.common).tolist()]
        found = []
        open_: list[tuple[int, int]] = []  # (start, depth), depths ascending
        for index, depth in enumerate([*self.common[1:].tolist(), 0], 1):
            start = index - 1
            while open_ and open_[-1][1] > depth:
                start, closed = open_.pop()
                # What the first has beyond the fork, and what each of the others adds.
                hanging = own[index] - own[start + 1] + int(self.lengths[start]) - closed
                found.append((start, index, closed, hanging))
            if depth and (not open_ or open_[-1][1] < depth):
                open_.append((start, depth))
        return sorted(found, key=lambda fork: (fork[0], -fork[1]))

    def _pack(self, members: Sequence[int], start: int, max_row_tokens: int) -> Iterator[Row]:
        """Rows of these inputs, in order; neighbours part where they share little or the row is full."""
        row = _RowBuilder(start)
        before = 0
        for index in members:
            if self.lengths[index] == start:
                continue  # all of it is in the trunk
            common = max(start, int(self.common[before + 1 : index + 1].min())) if row.size else start
            size = row.size + int(self.lengths[index]) - common
            cheap = common - start <= MAX_REPEATED_SHARE * row.size
            if row.size and (size > max_row_tokens or (size > ROW_TOKENS and cheap)):
                yield row.build()
                row, common = _RowBuilder(start), start
            row.add(self.names[index], self.tokens[index], common)
            before = index
        if row.size:
            yield row.build()

    def _chain(self, index: int, start: int, end: int, members: Iterable[int]) -> Row:
        """The tokens from `start` to `end` of one input, as `members` all have them."""
        path = np.arange(end - start)
        return Row(
            self.tokens[index][start:end], path + start, start, [(self.names[member], path) for member in members]
        )


class _RowBuilder:
    """A row while it is filled."""

    def __init__(self, start: int) -> None:
        self.start, self.size = start, 0
        self.path = np.empty(0, int)  # of the last input
        self.tokens: list[np.ndarray] = []
        self.depth: list[np.ndarray] = []
        self.paths: list[tuple[int, np.ndarray]] = []

    def add(self, name: int, tokens: np.ndarray, common: int) -> None:
        new = np.arange(self.size, self.size + len(tokens) - common)
        self.tokens.append(tokens[common:])
        self.depth.append(np.arange(common, len(tokens)))
        self.path = np.concatenate([self.path[: common - self.start], new])
        self.paths.append((name, self.path))
        self.size += len(new)

    def build(self) -> Row:
        return Row(np.concatenate(self.tokens), np.concatenate(self.depth), self.start, self.paths)


def common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two inputs begin with alike."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length
