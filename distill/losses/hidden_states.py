"""Hidden states of the student that follow the teacher's, layer by layer; no attention maps are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel

from limbeck.distill.recipe.schema import Layers
from limbeck.registry.core.errors import BadInput


class LayerMatching(torch.nn.Module):
    """A loss between chosen layers of student and teacher, and projections that are trained with the student.

    `cosine` is 1 - cos (DistilBERT, arXiv 1910.01108), `mse` the mean over the width of the squared difference
    (TinyBERT, arXiv 1909.10351). Where widths differ, a linear map of its own takes each student layer to the
    teacher's width, as TinyBERT does.
    """

    def __init__(self, settings: Layers, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.settings = settings
        self.map = layer_map(settings, depth(student.config), depth(teacher.config))
        widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
        self.projections: torch.nn.ModuleDict | None = None
        if widths[0] != widths[1]:
            made = {str(layer): _projection(widths[0], widths[1], layer) for layer in self.map}
            self.projections = torch.nn.ModuleDict(made)

    def forward(
        self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], rows: torch.Tensor
    ) -> torch.Tensor:
        """The weighted loss, summed over the tokens of `rows`, its mean over the layers that are matched: a scalar.

        Args:
            student: hidden states (B, T, d) after the embeddings and after each layer.
            teacher: likewise (B, T, d').
            rows: (B, T) bool.
        """
        total = torch.zeros((), device=rows.device)
        for mine, theirs in self.map.items():
            ours, target = student[mine][rows], teacher[theirs][rows].float()
            if self.projections is not None:
                ours = self.projections[str(mine)](ours)
            total = total + self._distance(ours.float(), target).sum()
        return self.settings.weight * total / len(self.map)

    def _distance(self, ours: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.settings.loss == "cosine":
            return 1 - F.cosine_similarity(ours, target, dim=-1)
        return F.mse_loss(ours, target, reduction="none").mean(-1)


def layer_map(settings: Layers, student: int, teacher: int) -> dict[int, int]:
    """Which layer of the teacher each matched layer of the student follows, counted from 1.

    Args:
        student, teacher: how many layers each has.

    Raises:
        BadInput: a layer that one of them does not have.
    """
    if settings.map is None:  # evenly spread, last to last
        return {layer: max(1, round(layer * teacher / student)) for layer in range(1, student + 1)}
    for mine, theirs in settings.map.items():
        for whose, layer, count in (("student", mine, student), ("teacher", theirs, teacher)):
            if not 1 <= layer <= count:
                raise BadInput(
                    f"layers.map takes the student's layer {mine} to the teacher's {theirs}, and the {whose} has "
                    f"layers 1 to {count}",
                    fix="count layers from 1, or leave map out: then they are evenly spread",
                )
    return dict(sorted(settings.map.items()))


def depth(config: PretrainedConfig) -> int:
    """How many layers a model of this config has."""
    return int(config.get_text_config().num_hidden_layers)


def _projection(width: int, target_width: int, layer: int) -> torch.nn.Linear:
    """A map that keeps lengths and angles as far as it can; the same each time, whatever was drawn before."""
    made = torch.nn.Linear(width, target_width, bias=False)
    torch.nn.init.orthogonal_(made.weight, generator=torch.Generator().manual_seed(layer))
    return made
