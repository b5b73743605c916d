"""Keys and values of texts that have left a batch, for prompts that begin as they did."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np


class Prefixes:
    """What texts left, at most `tokens` of them together; those longest without use go first."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._kept: OrderedDict[tuple[int, ...], list[np.ndarray]] = OrderedDict()  # least recently used first

    def wants(self, text: tuple[int, ...]) -> bool:
        """Whether `keep` would keep this text: it is short enough, and none that is kept begins so."""
        if not 0 < len(text) <= self.tokens:
            return False
        return all(common(text, other) < len(text) for other in self._kept)

    def keep(self, text: tuple[int, ...], parts: list[np.ndarray]) -> None:
        """Keep the keys and values of a text, (heads, length, size) for each past input."""
        for other in [other for other in self._kept if common(text, other) == len(other)]:  # it is in the new one
            del self._kept[other]
        self._kept[text] = parts
        while sum(map(len, self._kept)) > self.tokens:
            self._kept.popitem(last=False)

    def find(self, text: tuple[int, ...]) -> tuple[int, list[np.ndarray]]:
        """The longest beginning of `text` that is kept: its length, and the parts that hold it and maybe more."""
        length, best = max(((common(text, other), other) for other in self._kept), default=(0, ()))
        if not length:
            return 0, []
        self._kept.move_to_end(best)
        return length, self._kept[best]


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # the first `low` are alike, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
