"""Whether a model's tokenizer fits its embedding; known from its files, before its weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from limbeck.evals.tasks.faults import Fault
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.checkpoints.load import load_config, load_tokenizer

MAX_NAMED = 3  # tokens in a message


def tokenizer_faults(models: Sequence[ResolvedModel], trust_remote_code: bool = False) -> Iterator[Fault]:
    """A fault for each model whose tokenizer has tokens without a row in the embedding.

    A padding token needs none: nothing reads it. What an endpoint's server has is unknown.

    Raises BadInput if a configuration or tokenizer cannot be loaded.
    """
    for model in models:
        if model.endpoint or not model.has_tokenizer:
            continue
        config = load_config(model.path, trust_remote_code, label=model.label)
        rows = getattr(config.get_text_config(), "vocab_size", None)
        tokenizer = load_tokenizer(model.path, trust_remote_code, label=model.label)
        tokens = {index: token for token, index in tokenizer.get_vocab().items() if index != tokenizer.pad_token_id}
        beyond = sorted(index for index in tokens if rows is not None and index >= rows)
        if beyond:
            named = ", ".join(f"{tokens[index]!r} ({index})" for index in beyond[:MAX_NAMED])
            more = f" and {len(beyond) - MAX_NAMED:,} more" if beyond[MAX_NAMED:] else ""
            yield Fault(
                kind="tokenizer larger than the embedding",
                detail=f"{model.label}: the embedding has {rows:,} rows, and none for {named}{more}",
                file=str(model.path),
            )
