"""The prefix cache: keys and values of texts that left a batch, for later prompts with the same prefix."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np


class PrefixCache:
    """Keys and values of at most `max_tokens` tokens in all; the least recently used text is evicted first."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._entries: OrderedDict[tuple[int, ...], list[np.ndarray]] = OrderedDict()  # least recently used first

    def should_store(self, text: tuple[int, ...]) -> bool:
        """Whether a text is worth storing: not empty, not too long, and not the prefix of a stored text."""
        if not 0 < len(text) <= self.max_tokens:
            return False
        return all(common_prefix_length(text, other) < len(text) for other in self._entries)

    def store(self, text: tuple[int, ...], kv_arrays: list[np.ndarray]) -> None:
        """Store the keys and values of a text, (heads, length, head size) for each past input of the graph.

        Stored texts that are prefixes of this one are dropped.
        """
        prefixes = [other for other in self._entries if common_prefix_length(text, other) == len(other)]
        for prefix in prefixes:
            del self._entries[prefix]
        self._entries[text] = kv_arrays
        while sum(map(len, self._entries)) > self.max_tokens:
            self._entries.popitem(last=False)

    def find_longest(self, text: tuple[int, ...]) -> tuple[int, list[np.ndarray]]:
        """Find the longest stored prefix of `text`.

        Returns:
            Its length in tokens, and the arrays of `store` that hold it; they may hold more tokens. (0, []) if no
            stored text has a common prefix with `text`.
        """
        length, best = max(((common_prefix_length(text, other), other) for other in self._entries), default=(0, ()))
        if not length:
            return 0, []
        self._entries.move_to_end(best)
        return length, self._entries[best]


def common_prefix_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Number of tokens in the longest common prefix of two texts; a binary search over slices."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # the first `low` tokens are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
