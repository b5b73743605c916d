"""A batch: prompts of different lengths that are decoded together; they join and leave between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from limbeck.export.runtime.dynamic_cache import DynamicCache
from limbeck.export.runtime.prefix_cache import PrefixCache, common_prefix_length
from limbeck.export.runtime.slot import Slot
from limbeck.export.runtime.static_cache import StaticCache

if TYPE_CHECKING:
    from limbeck.export.runtime.session import Session

PREFIX_CACHE_TOKENS = 4096  # size of the prefix cache, in tokens
MIN_REUSED_TOKENS = 16  # computing fewer tokens takes no longer than copying them


class Batch:
    """The rows that one session decodes together, with their key-value cache and the prefix cache.

    A `Slot` identifies a row. The logits of a row do not depend on the other rows, nor on reused prefixes. Not
    thread-safe.

    A fused graph gets a `StaticCache`, any other graph a `DynamicCache`. The prefix of a prompt that an active row or
    the prefix cache already holds is copied instead of computed again.

    Args:
        session: the loaded artifact.
        prefix_cache_tokens: size of the prefix cache, in tokens; 0 disables it. There is no prefix reuse on a GPU, nor
            with recurrent states, of which no part belongs to a prefix.
    """

    def __init__(self, session: Session, prefix_cache_tokens: int = PREFIX_CACHE_TOKENS) -> None:
        self._slots: list[Slot] = []
        self._cache: StaticCache | DynamicCache = StaticCache(session) if session.is_fused else DynamicCache(session)
        # On a GPU every reuse would copy the cache through main memory.
        self._can_reuse = session.device == "cpu" and not session.is_recurrent
        self._prefix_cache = PrefixCache(prefix_cache_tokens if self._can_reuse else 0)

    def add_prompt(self, prompt: Sequence[int]) -> Slot:
        """Add a row for a prompt of token ids, at least one. Computes nothing yet: call `prefill`."""
        slot = Slot(tuple(prompt))
        self._cache.add(slot)
        self._slots.append(slot)
        return slot

    def prefill(self, slots: Sequence[Slot], max_tokens: int) -> list[np.ndarray | None]:
        """Compute at most `max_tokens` more prompt tokens of each slot; reused tokens do not count.

        Returns:
            For each slot, (V,) float32 logits after the last token of its prompt, or None if a part of the prompt
            is still unread.
        """
        logits_of_slot: dict[Slot, np.ndarray] = {}
        waiting = list(slots)
        while waiting:
            now: list[Slot] = []
            for slot in waiting:
                self._reuse_prefix(slot)
                if not any(self._should_wait_for(slot, other) for other in now):
                    now.append(slot)
            chunks = [slot.prompt[slot.length : slot.length + max_tokens] for slot in now]
            for slot, chunk, logits in zip(now, chunks, self._cache.prefill(now, chunks), strict=True):
                slot.length += len(chunk)
                logits_of_slot[slot] = logits
            waiting = [slot for slot in waiting if slot not in now]
        return [None if slot.unread_tokens else logits_of_slot[slot] for slot in slots]

    def step(self, slots: Sequence[Slot], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each slot; their prompts must be read completely.

        Returns:
            (n, V) float32 logits of the next token; the next step may overwrite them.
        """
        logits = self._cache.step(slots, tokens)
        for slot, token in zip(slots, tokens, strict=True):
            slot.generated_tokens.append(token)
            slot.length += 1
        return logits

    def verify(self, slot: Slot, tokens: Sequence[int]) -> np.ndarray:
        """Compute what would follow each of `tokens` after a slot's text: (len(tokens), V) float32 logits.

        The text stays as it is: `accept` the tokens that belong to it, in their order. For a fused graph without
        recurrent states only.
        """
        assert isinstance(self._cache, StaticCache)
        return self._cache.verify(slot, tokens)

    def accept(self, slot: Slot, token: int) -> None:
        """Append the next of the tokens of the last `verify` to a slot's text; nothing is computed."""
        slot.generated_tokens.append(token)
        slot.length += 1

    def truncate(self, slot: Slot, length: int) -> None:
        """Drop all but the first `length` tokens of a slot's text, at least its prompt."""
        del slot.generated_tokens[max(0, length - len(slot.prompt)) :]
        slot.length = length

    def remove_slot(self, slot: Slot) -> None:
        """Remove a row and put its text into the prefix cache."""
        tokens = slot.cached_tokens
        if self._prefix_cache.should_store(tokens):
            self._prefix_cache.store(tokens, self._cache.copy_prefix(slot, slot.length))
        self._cache.remove(slot)
        self._slots.remove(slot)
        slot.is_active = False

    def _reuse_prefix(self, slot: Slot) -> None:
        """Copy the longest prefix of the prompt that another slot or the prefix cache holds.

        The last token is always computed, since its logits are needed.
        """
        prefix = slot.prompt[:-1]
        min_length = slot.length + MIN_REUSED_TOKENS
        if not self._can_reuse or len(prefix) < min_length:
            return
        shared = [(other.shared_prefix_length(prefix), other) for other in self._slots if other is not slot]
        active_length, active_slot = max(shared, key=lambda pair: pair[0], default=(0, slot))
        cached_length, kv_arrays = self._prefix_cache.find_longest(prefix)
        length = max(active_length, cached_length)
        if length < min_length:
            return
        if cached_length > active_length:
            self._cache.load_prefix(slot, kv_arrays, length)
        else:
            self._cache.copy_from_slot(slot, active_slot, length)
        slot.reused_tokens += length - slot.length
        slot.length = length

    def _should_wait_for(self, slot: Slot, other: Slot) -> bool:
        """Whether `slot` should wait until `other` has computed the prefix that both share."""
        if not self._can_reuse or other.length < slot.length:
            return False
        return common_prefix_length(slot.prompt[:-1], other.prompt) >= slot.length + MIN_REUSED_TOKENS
