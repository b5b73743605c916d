"""An engine whose weights are loaded when something is first asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from evals.engines import Engine, identity, load, read_text
from evals.rows import Scored
from registry.resolve import Model


class LazyEngine:
    """See `evals.engines.Engine`. A model whose answers are all kept is never loaded."""

    def __init__(self, model: Model, trust_remote_code: bool = False) -> None:
        self._model = model
        self._trust_remote_code = trust_remote_code
        _, self.tokenizer, self.max_length = read_text(model.path, model.label, trust_remote_code)
        self.identity = identity(model.engine)

    @cached_property
    def loaded(self) -> Engine:
        """The engine itself."""
        return load(self._model, self._trust_remote_code)

    def scores(self, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int) -> Iterator[tuple[int, Scored]]:
        """See `Engine.scores`."""
        return self.loaded.scores(pairs, batch_tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, until: Sequence[str], **sampling: Any
    ) -> list[list[int]]:
        """See `Engine.generate`."""
        return self.loaded.generate(prompts, max_new_tokens, until, **sampling)
