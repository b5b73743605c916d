"""A slot: one row of a batch, its tokens and how many of them are in the key-value cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from limbeck.export.runtime.prefix_cache import common_prefix_length


@dataclass(eq=False)
class Slot:
    """A row of a batch, from `Batch.add_prompt` to `Batch.remove_slot`."""

    prompt: tuple[int, ...]
    length: int = 0  # tokens in the key-value cache
    reused_tokens: int = 0  # tokens copied from another slot or the prefix cache, not computed
    row: int = -1  # row of the static cache; -1 with a dynamic cache
    is_active: bool = True  # False after `Batch.remove_slot`
    generated_tokens: list[int] = field(default_factory=list)  # tokens after the prompt

    @property
    def unread_tokens(self) -> int:
        """Number of prompt tokens that are not in the cache yet."""
        return max(0, len(self.prompt) - self.length)

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens in the cache."""
        return (*self.prompt, *self.generated_tokens)[: self.length]

    def shared_prefix_length(self, text: tuple[int, ...]) -> int:
        """Length of the longest prefix of `text` that is in the cache."""
        length = min(common_prefix_length(text, self.prompt), self.length)
        return common_prefix_length(text, self.cached_tokens) if length == len(self.prompt) else length
