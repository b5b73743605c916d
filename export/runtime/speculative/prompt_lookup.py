"""Proposals from the text itself: what followed the last occurrence of its last tokens.

After A. Saxena, "Prompt Lookup Decoding" (2023), which transformers has as `prompt_lookup_num_tokens`. It pays where an
answer repeats its prompt: extraction, editing, answers from retrieved passages, code.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_NGRAM, MIN_NGRAM = 4, 2  # tokens that have to agree; longer ones are looked up first


class PromptLookup:
    """The n-grams of one growing text, by where they last ended."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0  # the n-grams that end up to here are known

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """Return at most `count` tokens that may follow `text`; [] if its last tokens are new in it.

        Args:
            text: the text of the call before, and more tokens.
        """
        for end in range(self._indexed + 1, len(text)):  # an n-gram at the end of the text has nothing after it
            for size in range(MIN_NGRAM, min(MAX_NGRAM, end) + 1):
                self._ends[tuple(text[end - size : end])] = end
        self._indexed = max(self._indexed, len(text) - 1)
        for size in range(min(MAX_NGRAM, len(text)), MIN_NGRAM - 1, -1):
            known = self._ends.get(tuple(text[len(text) - size :]))
            if known is not None:
                return list(text[known : known + count])
        return []
