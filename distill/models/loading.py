"""Checks that models fit the data, and runs them on blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from limbeck.distill.data.blocks import Blocks
from limbeck.registry.checkpoints.load import load_config
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id plus 1. A model's `vocab_size` may be larger: the rest is padding."""
    return max(tokenizer.get_vocab().values()) + 1


def check_fits(
    folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, trust_remote_code: bool = False
) -> None:
    """Raise BadInput if the model in `folder` has fewer positions than a block, or fewer embeddings than tokens."""
    config = load_config(folder, trust_remote_code).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and positions < max_length:
        raise BadInput(
            f"{folder} has {positions} positions and data.max_length is {max_length}",
            fix=f"set data.max_length = {positions} or less",
        )
    if config.vocab_size < vocabulary_size(tokenizer):
        raise BadInput(
            f"{folder} has embeddings for {config.vocab_size} tokens and its tokenizer {vocabulary_size(tokenizer)}",
            fix="take the tokenizer it was trained with",
        )


def device() -> str:
    """`cuda` if there is a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def batches(blocks: Blocks, vocab_size: int, indices: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
    """The blocks at `indices` in batches of at most 8 blocks, whose logits take at most a gigabyte."""
    size = max(1, min(8, 2**28 // (blocks.ids.shape[1] * vocab_size)))
    for start in range(0, len(indices), size):
        yield blocks.batch(indices[start : start + size])


def logits_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits (n, T, V) float32 of a batch of blocks."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids") if name in batch}
    return model(**inputs, use_cache=False).logits.float()
