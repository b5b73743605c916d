"""Keys and values of texts that have left a batch, for prompts that begin as they did."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np


class PrefixCache:
    """What texts left, at most `tokens` of them together; those longest without use go first."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._entries: OrderedDict[tuple[int, ...], list[np.ndarray]] = OrderedDict()  # least recently used first

    def should_store(self, text: tuple[int, ...]) -> bool:
        """Whether `keep` would keep this text: it is short enough, and none that is kept begins so."""
        if not 0 < len(text) <= self.max_tokens:
            return False
        return all(common_prefix_length(text, other) < len(text) for other in self._entries)

    def store(self, text: tuple[int, ...], kv_arrays: list[np.ndarray]) -> None:
        """Keep the keys and values of a text, (heads, length, size) for each past input."""
        for other in [
            other for other in self._entries if common_prefix_length(text, other) == len(other)
        ]:  # it is in the new one
            del self._entries[other]
        self._entries[text] = kv_arrays
        while sum(map(len, self._entries)) > self.max_tokens:
            self._entries.popitem(last=False)

    def find_longest(self, text: tuple[int, ...]) -> tuple[int, list[np.ndarray]]:
        """The longest beginning of `text` that is kept: its length, and the parts that hold it and maybe more."""
        length, best = max(((common_prefix_length(text, other), other) for other in self._entries), default=(0, ()))
        if not length:
            return 0, []
        self._entries.move_to_end(best)
        return length, self._entries[best]


def common_prefix_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # the first `low` are alike, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
