"""Proposals from a smaller model of the same vocabulary, such as a student of the model that checks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from limbeck.export.runtime.batch import Batch
from limbeck.export.runtime.session import PREFILL_LOGITS
from limbeck.export.runtime.slot import Slot
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from limbeck.export.runtime.session import Session


class DraftModel:
    """The greedy continuations of one growing text by a draft model.

    Args:
        session: the loaded draft model.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._batch = Batch(session, prefix_cache_tokens=0)
        self._slot: Slot | None = None

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """Return `count` tokens that may follow `text`; fewer at the end of the draft model's context.

        [] if `text` has a token id beyond the draft model's table, which may be padded less than the model's.

        Args:
            text: the text of the call before, and more tokens.
        """
        count = min(count, self._session.max_length - len(text))
        if count < 1 or max(text) >= self._session.vocab_size:
            return []
        proposed: list[int] = []
        logits = self._read(text)
        while True:
            proposed.append(int(logits.argmax()))
            if len(proposed) == count:
                return proposed
            assert self._slot is not None
            [logits] = self._batch.step([self._slot], proposed[-1:])

    def _read(self, text: Sequence[int]) -> np.ndarray:
        """(V,) logits after `text`; the tokens that the cache has are not computed again."""
        logits: np.ndarray | None = None
        if self._slot is None:
            self._slot = self._batch.add_prompt(text)
            while logits is None:
                [logits] = self._batch.prefill([self._slot], self._session.max_prefill_tokens)
            return logits
        known = self._slot.shared_prefix_length(tuple(text[:-1]))
        self._batch.truncate(self._slot, known)
        # Many tokens are new where the row decoded with others meanwhile: their logits have to fit in memory.
        size = max(1, PREFILL_LOGITS // self._session.vocab_size)
        for start in range(known, len(text), size):
            chunk = text[start : start + size]
            logits = self._batch.verify(self._slot, chunk)[-1]
            for token in chunk:
                self._batch.accept(self._slot, token)
        assert logits is not None  # the last token is always computed
        return logits


def check_draft(draft: Session, session: Session) -> None:
    """Raise BadInput if `draft` cannot draft for `session`: its tokens mean something else."""
    if draft.tokenizer.get_vocab() != session.tokenizer.get_vocab():
        raise BadInput(
            "the draft model has another vocabulary than the model",
            fix="give a student of the model, or another model of its family, with the same tokenizer.json",
        )
