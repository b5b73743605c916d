"""Opens a model's engine; its weights are loaded only when a request is not in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from limbeck.evals.engines.batches import ContinuationScore
from limbeck.evals.engines.endpoint import EndpointEngine
from limbeck.evals.engines.engine import Engine, library_versions, load_engine, load_tokenizer
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.terminal import print_status


def open_engine(model: ResolvedModel, trust_remote_code: bool = False) -> Engine:
    """The engine of any model. Raises BadInput if its tokenizer cannot be loaded."""
    if model.endpoint:
        engine = EndpointEngine(model.endpoint, load_tokenizer(model.path, model.label, trust_remote_code))
        print_status(
            f"{model.label}: over HTTP {engine.max_length} of its {engine.context} tokens of context can be used; "
            "scores of longer texts differ from those of the same model run locally"
        )
        return engine
    return LazyEngine(model, trust_remote_code)


class LazyEngine:
    """See `limbeck.evals.engines.engine.Engine`. A model whose answers are all in the cache is never loaded."""

    def __init__(self, model: ResolvedModel, trust_remote_code: bool = False) -> None:
        self._model = model
        self._trust_remote_code = trust_remote_code
        _, self.tokenizer, self.max_length = load_tokenizer(model.path, model.label, trust_remote_code)
        self.identity = library_versions(model.engine)

    @cached_property
    def engine(self) -> Engine:
        """The loaded engine."""
        return load_engine(self._model, self._trust_remote_code)

    def scores(
        self, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """See `Engine.scores`."""
        return self.engine.scores(pairs, batch_tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, until: Sequence[str], **sampling: Any
    ) -> Iterable[list[int] | str]:
        """See `Engine.generate`."""
        return self.engine.generate(prompts, max_new_tokens, until, **sampling)
