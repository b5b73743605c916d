"""The student and its objective as one module, batch in and loss out: the module that the Trainer trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from limbeck.distill.losses import chunked_head, divergences, text_chunks
from limbeck.distill.losses.chunked_head import LazyLogits, SplitModel
from limbeck.distill.losses.hidden_states import LayerMatching
from limbeck.distill.recipe.schema import Objective
from limbeck.registry.core.errors import BadInput


class Losses(NamedTuple):
    """The loss of a batch, and counts over its targets.

    Attributes:
        loss: the scalar to minimise, in nats.
        targets: number of targets, an int64 scalar.
        agreement_count: number of targets at which student and teacher have the same most likely token, an int64
            scalar; 0 if it is not counted.
    """

    loss: torch.Tensor
    targets: torch.Tensor
    agreement_count: torch.Tensor


class Distiller(torch.nn.Module):
    """A student with its objective and, if it runs online, its teacher.

    Args:
        student: trained in place.
        teacher: runs online, without gradients; None if batches bring its stored outputs, or if none are needed.
        vocab_size: of the tokenizer; the teacher's logits beyond it are padding and are dropped.

    Attributes:
        counts_agreement: whether to count `Losses.agreement_count`, which takes time: set it for logged batches.

    Raises:
        BadInput: layers to match without a teacher that runs online, or layers that do not exist.
    """

    def __init__(
        self, student: PreTrainedModel, objective: Objective, teacher: PreTrainedModel | None, vocab_size: int
    ) -> None:
        super().__init__()
        self.student = student
        self._no_split_modules = student._no_split_modules  # accelerate reads FSDP's units from this attribute
        self.objective = objective
        self.vocab_size = vocab_size
        self.counts_agreement = False
        # NamedTuples, not modules: the teacher's parameters must not become parameters of this module.
        self._split_student = SplitModel.from_model(student)
        uses_online_teacher = teacher is not None and objective.uses_teacher
        self._split_teacher = SplitModel.from_model(teacher) if teacher is not None and uses_online_teacher else None
        self.layers: LayerMatching | None = None
        if objective.layers is not None:
            if teacher is None:
                raise BadInput(
                    "layers match the hidden states of a teacher that runs, and a cache stores none",
                    fix='set cache.form = "online"',
                )
            self.layers = LayerMatching(objective.layers, student, teacher)

    @property
    def teacher(self) -> PreTrainedModel | None:
        return self._split_teacher.model if self._split_teacher else None

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Turn on activation checkpointing in the student; the Trainer calls this name."""
        self.student.activation_checkpointing_enable(**settings)

    def forward(self, batch: Mapping[str, Any], num_items: float | torch.Tensor) -> Losses:
        """Compute the loss of a batch.

        Args:
            batch: from `Blocks.batch`; with `teacher`, the arrays of a stored form (B, T, ...), if the teacher's
                outputs are stored; and with `written` true if the student wrote the batch.
            num_items: targets of the whole optimizer step, over all accumulated batches and processes. The loss is
                the sum over this batch divided by it.
        """
        rows = batch["labels"][:, 1:] != -100
        labels = batch["labels"][:, 1:][rows]
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        needs_states = self.layers is not None
        student = self._split_student.run(inputs, rows, states=needs_states)
        if self.objective.divergence == "chunks":
            chunks = {name: array[:, :-1] for name, array in batch["teacher"].items()}
            total = text_chunks.loss(student.logits, labels, rows, chunks, self.objective)
            return Losses(total / num_items, rows.sum(), torch.zeros_like(rows.sum()))
        distribution: LazyLogits | divergences.StoredDistribution | None = None
        if "teacher" in batch and self.objective.uses_teacher:
            distribution = divergences.stored_distribution(
                {name: array[:, :-1][rows] for name, array in batch["teacher"].items()}
            )
        elif self._split_teacher is not None:
            with torch.no_grad():
                teacher = self._split_teacher.run(inputs, rows, states=needs_states)
            distribution = teacher.logits._replace(vocab_size=self.vocab_size)
        # The student's own text has no labels to learn from.
        objective = self.objective.model_copy(update={"labels": 0.0}) if batch.get("written") else self.objective
        total, agreed = chunked_head.loss(student.logits, labels, objective, distribution, self.counts_agreement)
        if self.layers is not None:
            total = total + self.layers(student.states, teacher.states, F.pad(rows, (0, 1)))
        return Losses(total / num_items, rows.sum(), agreed)
