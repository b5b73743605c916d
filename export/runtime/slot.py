"""A slot of a batch: one row and the tokens it has."""

from __future__ import annotations

from dataclasses import dataclass, field

from limbeck.export.runtime.prefix_cache import common


@dataclass(eq=False)
class Slot:
    """A row of a batch, held from `begin` to `end`."""

    prompt: tuple[int, ...]
    length: int = 0  # tokens in the cache
    cached: int = 0  # of those, how many another text had read
    row: int = -1  # of the cache, where it has rows
    held: bool = True
    given: list[int] = field(default_factory=list)  # tokens that came after the prompt

    @property
    def unread(self) -> int:
        """Prompt tokens that the model has not seen yet."""
        return max(0, len(self.prompt) - self.length)

    @property
    def tokens(self) -> tuple[int, ...]:
        """What is in the cache."""
        return (*self.prompt, *self.given)[: self.length]

    def begins(self, text: tuple[int, ...]) -> int:
        """How many tokens of the beginning of `text` are in the cache."""
        length = min(common(text, self.prompt), self.length)
        return common(text, self.tokens) if length == len(self.prompt) else length
