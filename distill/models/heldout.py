"""Scores of a model on held-out text: bits per byte, and agreement with the teacher."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from limbeck.distill.data.blocks import Blocks, layout_digest
from limbeck.distill.models import loading

SAMPLE_BLOCKS = 16  # scored during training
FINAL_BLOCKS = 128  # scored after training


class Score(NamedTuple):
    """Bits per byte of text, and the share of targets for which student and teacher predict the same token.

    `agreement` is None without a teacher.
    """

    bits_per_byte: float
    agreement: float | None


def sample_blocks(blocks: Blocks, count: int = SAMPLE_BLOCKS) -> Blocks:
    """At most `count` evenly spread blocks. `text_tokens` and `text_bytes` stay those of all blocks."""
    chosen = np.unique(np.linspace(0, len(blocks.ids) - 1, count).astype(int))
    ids, segments, targets = blocks.ids[chosen], blocks.segments[chosen], blocks.targets[chosen]
    digest = layout_digest(ids, segments, targets)
    return blocks._replace(ids=ids, segments=segments, targets=targets, digest=digest)


def bits_per_byte(model: PreTrainedModel, blocks: Blocks) -> float:
    """Bits per byte of text on at most `FINAL_BLOCKS` evenly spread blocks."""
    return score(model, sample_blocks(blocks, FINAL_BLOCKS)).bits_per_byte


@torch.no_grad()
def likeliest_tokens(model: PreTrainedModel, blocks: Blocks, vocab_size: int) -> np.ndarray:
    """The model's most likely next token at each position, among the first `vocab_size`: (N, T) int32."""
    model.eval()
    tokens = [
        loading.logits_of(model, batch)[..., :vocab_size].argmax(-1).cpu().numpy()
        for batch in loading.batches(blocks, vocab_size, np.arange(len(blocks.ids)))
    ]
    return np.concatenate(tokens).astype(np.int32)


@torch.no_grad()
def score(student: PreTrainedModel, blocks: Blocks, teacher: np.ndarray | None = None, bf16: bool = False) -> Score:
    """Score the student on the blocks.

    Args:
        teacher: its most likely next token at each position (N, T); None without a teacher.
        bf16: run under autocast.
    """
    nats = torch.zeros((), dtype=torch.float64)
    targets = agreed = done = 0
    student.eval()
    for batch in loading.batches(blocks, student.config.get_text_config().vocab_size, np.arange(len(blocks.ids))):
        with torch.autocast(student.device.type, torch.bfloat16, enabled=bf16):
            logits = loading.logits_of(student, batch)[:, :-1]
        labels = batch["labels"][:, 1:].to(logits.device)
        rows = labels != -100
        nats += F.cross_entropy(logits[rows], labels[rows], reduction="sum").double().cpu()
        targets += int(rows.sum())
        if teacher is not None:
            teacher_tokens = torch.from_numpy(teacher[done : done + len(labels), :-1]).to(logits.device)
            agreed += int((logits.argmax(-1) == teacher_tokens)[rows].sum())
        done += len(labels)
    targets = max(targets, 1)
    per_token = float(nats) / targets / float(np.log(2))
    return Score(per_token * blocks.text_tokens / blocks.text_bytes, agreed / targets if teacher is not None else None)
