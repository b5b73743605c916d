"""A slot of a batch: one row and the tokens it has."""

from __future__ import annotations

from dataclasses import dataclass, field

from limbeck.export.runtime.prefix_cache import common_prefix_length


@dataclass(eq=False)
class Slot:
    """A row of a batch, held from `begin` to `end`."""

    prompt: tuple[int, ...]
    length: int = 0  # tokens in the cache
    reused_tokens: int = 0  # of those, how many another text had read
    row: int = -1  # of the cache, where it has rows
    is_active: bool = True
    generated_tokens: list[int] = field(default_factory=list)  # tokens that came after the prompt

    @property
    def unread_tokens(self) -> int:
        """Prompt tokens that the model has not seen yet."""
        return max(0, len(self.prompt) - self.length)

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """What is in the cache."""
        return (*self.prompt, *self.generated_tokens)[: self.length]

    def shared_prefix_length(self, text: tuple[int, ...]) -> int:
        """How many tokens of the beginning of `text` are in the cache."""
        length = min(common_prefix_length(text, self.prompt), self.length)
        return common_prefix_length(text, self.cached_tokens) if length == len(self.prompt) else length
