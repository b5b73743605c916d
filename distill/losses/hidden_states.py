"""A loss that pulls the student's hidden states to the teacher's, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel

from limbeck.distill.recipe.schema import Layers
from limbeck.registry.core.errors import BadInput


class LayerMatching(torch.nn.Module):
    """The distance between matched layers of student and teacher.

    `cosine` is 1 - cos (DistilBERT, arXiv 1910.01108), `mse` the mean over the width of the squared difference
    (TinyBERT, arXiv 1909.10351). If the widths differ, each student layer has a linear map to the teacher's width,
    which is trained with the student, as in TinyBERT. It needs no attention maps.
    """

    def __init__(self, settings: Layers, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.settings = settings
        self.map = layer_map(settings, depth(student.config), depth(teacher.config))
        widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
        self.projections: torch.nn.ModuleDict | None = None
        if widths[0] != widths[1]:
            projections = {str(layer): _projection(widths[0], widths[1], layer) for layer in self.map}
            self.projections = torch.nn.ModuleDict(projections)

    def forward(
        self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], rows: torch.Tensor
    ) -> torch.Tensor:
        """The weighted loss: summed over the tokens of `rows`, averaged over the matched layers; a scalar.

        Args:
            student: hidden states (B, T, d) after the embeddings and after each layer.
            teacher: the same of the teacher, (B, T, d').
            rows: (B, T) bool.
        """
        total = torch.zeros((), device=rows.device)
        for student_layer, teacher_layer in self.map.items():
            states, target = student[student_layer][rows], teacher[teacher_layer][rows].float()
            if self.projections is not None:
                states = self.projections[str(student_layer)](states)
            total = total + self._distance(states.float(), target).sum()
        return self.settings.weight * total / len(self.map)

    def _distance(self, states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.settings.loss == "cosine":
            return 1 - F.cosine_similarity(states, target, dim=-1)
        return F.mse_loss(states, target, reduction="none").mean(-1)


def layer_map(settings: Layers, student_depth: int, teacher_depth: int) -> dict[int, int]:
    """The teacher layer that each matched student layer follows, both counted from 1.

    Without `settings.map`, all student layers follow teacher layers that are evenly spread, last to last.

    Raises:
        BadInput: a layer that student or teacher does not have.
    """
    if settings.map is None:
        return {layer: max(1, round(layer * teacher_depth / student_depth)) for layer in range(1, student_depth + 1)}
    for student_layer, teacher_layer in settings.map.items():
        for role, layer, count in (
            ("student", student_layer, student_depth),
            ("teacher", teacher_layer, teacher_depth),
        ):
            if not 1 <= layer <= count:
                raise BadInput(
                    f"layers.map maps the student's layer {student_layer} to the teacher's {teacher_layer}, and the "
                    f"{role} has layers 1 to {count}",
                    fix="count layers from 1, or leave map out to spread them evenly",
                )
    return dict(sorted(settings.map.items()))


def depth(config: PretrainedConfig) -> int:
    """The number of layers of a model with this config."""
    return int(config.get_text_config().num_hidden_layers)


def _projection(width: int, target_width: int, layer: int) -> torch.nn.Linear:
    """An orthogonal map, the same in every run: its seed is the layer's number."""
    projection = torch.nn.Linear(width, target_width, bias=False)
    torch.nn.init.orthogonal_(projection.weight, generator=torch.Generator().manual_seed(layer))
    return projection
