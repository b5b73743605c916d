"""Rows that are decoded together, each at its own length; they join and leave between two steps."""

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

PREFIX_CACHE_TOKENS = 4096  # of texts that have left, for later prompts that begin alike
MIN_REUSED_TOKENS = 16  # tokens; fewer are read as fast as they are copied


class Batch:
    """The rows that one loaded artifact decodes at present, and their caches.

    Rows are told apart by their `Slot`. What a row's logits are does not depend on the other rows, nor on what is
    reused (but for int8 activations, whose scales do). Not for several threads at once.

    Args:
        kept_tokens: the most tokens whose keys and values are kept of texts that have left, so that a prompt that
            begins alike does not read them again.
    """

    def __init__(self, session: Session, prefix_cache_tokens: int = PREFIX_CACHE_TOKENS) -> None:
        self._slots: list[Slot] = []
        self._cache: StaticCache | DynamicCache = StaticCache(session) if session.is_fused else DynamicCache(session)
        # On a GPU every reuse would take the cache through main memory.
        self._prefix_cache = PrefixCache(prefix_cache_tokens if session.device == "cpu" else 0)
        self._can_reuse = session.device == "cpu"

    def add_prompt(self, prompt: Sequence[int], max_new_tokens: int) -> Slot:
        """A new row that reads `prompt` and then takes at most `max_new_tokens` tokens. Nothing is computed yet."""
        slot = Slot(tuple(prompt))
        self._cache.add(slot)
        self._slots.append(slot)
        return slot

    def prefill(self, slots: Sequence[Slot], max_tokens: int) -> list[np.ndarray | None]:
        """Let each slot see at most `max_tokens` more tokens of its prompt; what other texts have read is not counted.

        Returns:
            for each slot, (V,) float32 logits after the last token of its prompt; None while some is unread.
        """
        found: dict[Slot, np.ndarray] = {}
        waiting = list(slots)
        while waiting:
            now: list[Slot] = []
            for slot in waiting:
                self._reuse_prefix(slot)
                if not any(self._should_wait_for(slot, other) for other in now):
                    now.append(slot)
            pieces = [slot.prompt[slot.length : slot.length + max_tokens] for slot in now]
            for slot, piece, logits in zip(now, pieces, self._cache.prefill(now, pieces), strict=True):
                slot.length += len(piece)
                found[slot] = logits
            waiting = [slot for slot in waiting if slot not in now]
        return [None if slot.unread_tokens else found[slot] for slot in slots]

    def step(self, slots: Sequence[Slot], tokens: Sequence[int]) -> np.ndarray:
        """Give each slot, whose prompt is read, its next token.

        Returns:
            (n, V) float32 logits of what follows; the next step may overwrite them.
        """
        logits = self._cache.step(slots, tokens)
        for slot, token in zip(slots, tokens, strict=True):
            slot.generated_tokens.append(token)
            slot.length += 1
        return logits

    def remove_slot(self, slot: Slot) -> None:
        """Let a row go; the next step is without it."""
        tokens = slot.cached_tokens
        if self._prefix_cache.should_store(tokens):
            self._prefix_cache.store(tokens, self._cache.copy_prefix(slot, slot.length))
        self._cache.remove(slot)
        self._slots.remove(slot)
        slot.is_active = False

    def _reuse_prefix(self, slot: Slot) -> None:
        """Take over what another text has of this prompt; its last token is read in any case, for the logits."""
        if not self._can_reuse:
            return
        before, least = slot.length, slot.length + MIN_REUSED_TOKENS
        wanted = slot.prompt[:-1]
        others = [(other.shared_prefix_length(wanted), other) for other in self._slots if other is not slot]
        length, other = max(others, key=lambda pair: pair[0], default=(0, slot))
        kept, parts = self._prefix_cache.find_longest(wanted) if len(wanted) >= least else (0, [])
        if max(length, kept) < least:
            return
        if kept > length:
            self._cache.load_prefix(slot, parts, kept)
        else:
            self._cache.copy_from_slot(slot, other, length)
        slot.length = max(kept, length)
        slot.reused_tokens += slot.length - before

    def _should_wait_for(self, slot: Slot, other: Slot) -> bool:
        """Whether `slot` had better wait until `other` has read what both begin with."""
        if not self._can_reuse or other.length < slot.length:
            return False
        return common_prefix_length(slot.prompt[:-1], other.prompt) >= slot.length + MIN_REUSED_TOKENS
