"""A local teacher: runs over blocks and returns what teacher caches store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from limbeck.distill.cache.teacher_cache import Capture, TeacherCache, TeacherPass, arrays_to_store
from limbeck.distill.data.blocks import Blocks
from limbeck.distill.models import loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def local_pass(model: PreTrainedModel, blocks: Blocks, vocab_size: int, bf16: bool) -> TeacherPass:
    """A function of block numbers and caches that runs the teacher once and returns the arrays of each cache.

    Args:
        vocab_size: of the tokenizer; logits beyond it are padding and are dropped.
        bf16: run under autocast.
    """
    torch.nn.Module.to(model, loading.device()).eval()

    @torch.inference_mode()
    def run(indices: np.ndarray, caches: list[TeacherCache]) -> list[dict[str, np.ndarray]]:
        def block_logits() -> Iterator[torch.Tensor]:
            for batch in loading.batches(blocks, vocab_size, indices):
                with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                    logits = loading.logits_of(model, batch)[..., :vocab_size]
                yield from logits

        return arrays_to_store(blocks, indices, block_logits(), caches)

    return run


def local_capture(model: PreTrainedModel, blocks: Blocks, cache: TeacherCache, bf16: bool) -> Capture:
    """`local_pass` for a single cache."""
    assert cache.form is not None
    run = local_pass(model, blocks, cache.form.vocab_size, bf16)
    return lambda indices: run(indices, [cache])[0]
