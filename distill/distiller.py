"""The student with its objective as one module: a batch in, its loss out. This is what the Trainer trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from distill import objectives
from distill.recipe import Objective


class Losses(NamedTuple):
    """What came of a batch: the loss to go down, a scalar in nats; and over its targets, counted, not averaged:
    how many there are, and on how many of them student and teacher have the same likeliest token."""

    loss: torch.Tensor
    targets: torch.Tensor
    agreed: torch.Tensor


class Distiller(torch.nn.Module):
    """A student and what it learns from.

    Args:
        student: trained in place.
        teacher: runs online, in no gradient; None where its stored outputs come with the batch, or none are needed.
        vocab_size: of the tokenizer; a teacher's logits beyond it are padding and are left out.
    """

    def __init__(
        self, student: PreTrainedModel, objective: Objective, teacher: PreTrainedModel | None, vocab_size: int
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self._teacher = [teacher]  # in a list: its parameters are none of this module's
        self.vocab_size = vocab_size

    @property
    def teacher(self) -> PreTrainedModel | None:
        return self._teacher[0]

    def forward(self, batch: Mapping[str, Any], num_items: float | torch.Tensor) -> Losses:
        """The loss of a batch.

        Args:
            batch: as `Blocks.batch` gives it, and `teacher`, the arrays of a stored form (B, T, ...), where stored.
            num_items: targets of the whole optimizer step, over its accumulated batches: the loss is the sum over
                this batch divided by it.
        """
        labels = batch["labels"][:, 1:]
        rows = labels != -100
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids"), "use_cache": False}
        logits = self.student(**inputs).logits[:, :-1][rows]
        said = self._said(batch, inputs, rows)
        loss = objectives.loss(logits, labels[rows], self.objective, said) / num_items
        agreed = (logits.argmax(-1) == _likeliest(said)).sum() if said is not None else torch.zeros_like(rows.sum())
        return Losses(loss, rows.sum(), agreed)

    def _said(self, batch: Mapping[str, Any], inputs: dict[str, Any], rows: torch.Tensor) -> objectives.Said | None:
        if not self.objective.uses_teacher:
            return None
        if "teacher" in batch:
            return objectives.stored({name: array[:, :-1][rows] for name, array in batch["teacher"].items()})
        assert self.teacher is not None
        with torch.no_grad():
            return self.teacher(**inputs).logits[:, :-1, : self.vocab_size][rows]


def _likeliest(said: objectives.Said) -> torch.Tensor:
    """The teacher's likeliest token at each position, as far as what is stored tells: (N,)."""
    if isinstance(said, objectives.TopK):
        return said.ids[:, 0]
    if isinstance(said, objectives.Samples):
        return said.ids.gather(-1, said.weights.argmax(-1, keepdim=True))[:, 0]
    return said.argmax(-1)
