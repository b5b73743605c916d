"""The student with its objective as one module: a batch in, its loss out. This is what the Trainer trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from limbeck.distill.losses import chunked_head, divergences
from limbeck.distill.losses import chunks as chunks_module
from limbeck.distill.losses.chunked_head import Body, LazyLogits
from limbeck.distill.losses.hidden_states import LayerMatching
from limbeck.distill.recipe.schema import Objective
from limbeck.registry.core.errors import BadInput


class Losses(NamedTuple):
    """What came of a batch: the loss to go down, a scalar in nats; and over its targets, counted, not averaged:
    how many there are, and, where it is measured, on how many of them student and teacher have the same likeliest
    token."""

    loss: torch.Tensor
    targets: torch.Tensor
    agreement_count: torch.Tensor


class Distiller(torch.nn.Module):
    """A student and what it learns from.

    Args:
        student: trained in place.
        teacher: runs online, in no gradient; None where its stored outputs come with the batch, or none are needed.
        vocab_size: of the tokenizer; a teacher's logits beyond it are padding and are left out.

    Attributes:
        measure: whether `Losses.agreed` is counted, which takes time; set it for the batches that are to be logged.

    Raises:
        BadInput: layers to match without a teacher that runs online, or layers that are not there.
    """

    def __init__(
        self, student: PreTrainedModel, objective: Objective, teacher: PreTrainedModel | None, vocab_size: int
    ) -> None:
        super().__init__()
        self.student = student
        self._no_split_modules = student._no_split_modules  # by the name that accelerate looks for: FSDP's units
        self.objective = objective
        self.vocab_size = vocab_size
        self.counts_agreement = False
        # In a list: what is in there is none of this module's parameters.
        self._bodies = [
            Body.from_model(model)
            for model in (student, teacher if objective.uses_teacher else None)
            if model is not None
        ]
        self.layers: LayerMatching | None = None
        if objective.layers is not None:
            if teacher is None:
                raise BadInput(
                    "layers follow the hidden states of a teacher that runs, and a cache stores none",
                    fix='set cache.form = "online"',
                )
            self.layers = LayerMatching(objective.layers, student, teacher)

    @property
    def teacher(self) -> PreTrainedModel | None:
        return self._bodies[1].model if len(self._bodies) > 1 else None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The student's, by the name that the Trainer calls."""
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

    def forward(self, batch: Mapping[str, Any], num_items: float | torch.Tensor) -> Losses:
        """The loss of a batch.

        Args:
            batch: as `Blocks.batch` gives it, and `teacher`, the arrays of a stored form (B, T, ...), where stored;
                `written` is true where the student wrote it.
            num_items: targets of the whole optimizer step, over its accumulated batches: the loss is the sum over
                this batch divided by it.
        """
        rows = batch["labels"][:, 1:] != -100
        labels = batch["labels"][:, 1:][rows]
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        matches = self.layers is not None
        student = self._bodies[0].run(inputs, rows, states=matches)
        if self.objective.divergence == "chunks":
            said_of = {name: array[:, :-1] for name, array in batch["teacher"].items()}
            total = chunks_module.loss(student.logits, labels, rows, said_of, self.objective)
            return Losses(total / num_items, rows.sum(), torch.zeros_like(rows.sum()))
        said: LazyLogits | divergences.StoredDistribution | None = None
        if "teacher" in batch and self.objective.uses_teacher:
            said = divergences.stored_distribution(
                {name: array[:, :-1][rows] for name, array in batch["teacher"].items()}
            )
        elif len(self._bodies) > 1:
            with torch.no_grad():
                teacher = self._bodies[1].run(inputs, rows, states=matches)
            said = teacher.logits._replace(vocab_size=self.vocab_size)
        # Of what the student wrote itself there are no labels to learn.
        objective = self.objective.model_copy(update={"labels": 0.0}) if batch.get("written") else self.objective
        total, agreed = chunked_head.loss(student.logits, labels, objective, said, self.counts_agreement)
        if self.layers is not None:
            total = total + self.layers(student.states, teacher.states, F.pad(rows, (0, 1)))
        return Losses(total / num_items, rows.sum(), agreed)
