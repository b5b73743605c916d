"""Pruning: makes a student from some layers of the teacher (depth), and their most important units (width).

Layers are chosen by number or evenly spread, as in DistilBERT (arXiv 1910.01108). Channels, neurons and heads are
chosen by their activations on training text, as in Minitron (arXiv 2407.14679). `pruning_shapes` says what the axes of
each architecture's tensors are.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck.distill.data.blocks import Blocks
from limbeck.distill.models import loading
from limbeck.distill.models.pruning_shapes import FAMILIES, Shape, pruned_shape, shape_of, student_config
from limbeck.distill.recipe.schema import Prune

# (module path, kind, activations (n, T, C), mask of tokens that are not padding (n, T)). The kinds: `hidden`, a norm's
# outputs; `norm input`; `neurons` and `heads`, the inputs of the projection after them.
ActivationCallback = Callable[[str, str, torch.Tensor, torch.Tensor], None]


class KeptUnits(NamedTuple):
    """Indices of the units to keep, each (n,) ascending: channels, and for each layer neurons and heads."""

    hidden: torch.Tensor
    neurons: dict[int, torch.Tensor]
    heads: dict[int, torch.Tensor]
    kv_heads: dict[int, torch.Tensor]

    def units(self, axis: str, layer: int | None) -> torch.Tensor:
        """The units (n,) to keep on an axis; `layer` is None outside the layers."""
        if axis == "hidden":
            return self.hidden
        assert layer is not None
        units: torch.Tensor = getattr(self, axis)[layer]
        return units


def prune(teacher: PreTrainedModel, spec: Prune, blocks: Blocks) -> PreTrainedModel:
    """Make the student from the teacher's weights, in the teacher's dtype.

    A norm divides by the root mean square of a token's channels, which changes if channels are cut. The norm's weights
    are scaled by the mean change, so that cutting channels that are always zero changes no output.

    Args:
        blocks: training text; importance is measured on its first `spec.calibration_blocks`.

    Raises:
        BadInput: the teacher cannot be pruned to `spec`.
    """
    before, after = shape_of(teacher.config), pruned_shape(teacher.config, spec)
    calibration = np.arange(min(spec.calibration_blocks, len(blocks.ids)))
    narrower = after[1:] != before[1:]
    scores = importance(teacher, blocks, calibration) if narrower else {}
    kept = _select_units(scores, before, after)
    scales = _norm_scales(teacher, blocks, calibration, kept.hidden) if after.hidden < before.hidden else {}
    student = AutoModelForCausalLM.from_config(student_config(teacher.config, after), dtype=teacher.dtype)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    layers = FAMILIES[teacher.config.model_type].layers
    for path, axes in _axes(student).items():
        layer, source = _layer_number(path, layers), path
        if layer is not None:
            layer = after.layers[layer]
            source = f"{layers}.{layer}.{path.removeprefix(f'{layers}.').partition('.')[2]}"
        for name, parameter in student.get_submodule(path).named_parameters(recurse=False):
            whole = teacher.get_parameter(f"{source}.{name}").detach()
            transposed = whole.ndim == 2 and isinstance(student.get_submodule(path), Conv1D)
            order = axes[::-1] if transposed else axes[: whole.ndim]
            parameter.data = _prune_tensor(whole, order, kept, layer, before) * scales.get(f"{source}.{name}", 1.0)
    student.tie_weights()
    return student.eval()


def importance(teacher: PreTrainedModel, blocks: Blocks, indices: np.ndarray) -> dict[tuple[str, int | None], Any]:
    """The importance of each channel, neuron and head: (axis, layer) -> (n,) float64. Channels have layer None.

    It is the size of the unit's activations: the mean over the tokens of a block, then the L2 norm over blocks, the
    best aggregation in Minitron. For channels, the outputs of the norms, summed over norms; for neurons and heads, the
    inputs of the projection after them.
    """
    layers, heads = FAMILIES[teacher.config.model_type].layers, shape_of(teacher.config).heads
    squares: dict[tuple[str, str], Any] = defaultdict(float)

    def add_squares(path: str, kind: str, value: torch.Tensor, valid: torch.Tensor) -> None:
        if kind == "norm input":
            return
        value = value.double()
        size = value.unflatten(-1, (heads, -1)).norm(dim=-1) if kind == "heads" else value.abs()
        means = (size * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        squares[kind, path] += means.square().sum(0)

    _run_with_hooks(teacher, blocks, indices, add_squares)
    scores: dict[tuple[str, int | None], Any] = defaultdict(float)
    for (kind, path), square in squares.items():
        scores[kind, None if kind == "hidden" else _layer_number(path, layers)] += square.sqrt().cpu()
    return scores


def _norm_scales(
    teacher: PreTrainedModel, blocks: Blocks, indices: np.ndarray, channels: torch.Tensor
) -> dict[str, float]:
    """The factor for the weights of each norm: the mean ratio of the root mean squares after and before the cut."""
    ratios: dict[str, list[torch.Tensor]] = defaultdict(list)
    norms = dict(teacher.named_modules())

    def add_ratio(path: str, kind: str, value: torch.Tensor, valid: torch.Tensor) -> None:
        if kind == "norm input":
            centred = isinstance(norms[path], torch.nn.LayerNorm)
            ratio = _root_mean_square(value[..., channels], centred) / _root_mean_square(value, centred)
            ratios[f"{path}.weight"].append(ratio[valid])

    _run_with_hooks(teacher, blocks, indices, add_ratio)
    # A token whose channels are all zero has no ratio (NaN).
    return {name: float(torch.cat(each).nanmean().nan_to_num(nan=1.0)) for name, each in ratios.items()}


def _root_mean_square(value: torch.Tensor, centred: bool) -> torch.Tensor:
    value = value.double()
    if centred:
        value = value - value.mean(-1, keepdim=True)
    return value.square().mean(-1).sqrt()


@torch.inference_mode()
def _run_with_hooks(
    teacher: PreTrainedModel, blocks: Blocks, indices: np.ndarray, on_activation: ActivationCallback
) -> None:
    """Run the teacher over the blocks at `indices`, and call `on_activation` for each activation."""
    valid = torch.empty(0)
    hooks = []
    for path, axes in _axes(teacher).items():
        module = teacher.get_submodule(path)
        if axes == ("hidden",):
            hooks.append(
                module.register_forward_pre_hook(lambda _, x, p=path: on_activation(p, "norm input", x[0], valid))
            )
            hooks.append(module.register_forward_hook(lambda _, x, y, p=path: on_activation(p, "hidden", y, valid)))
        elif axes[-1] in ("neurons", "heads"):
            hooks.append(
                module.register_forward_pre_hook(lambda _, x, p=path, a=axes: on_activation(p, a[-1], x[0], valid))
            )
    torch.nn.Module.to(teacher, loading.device()).eval()
    try:
        for index in np.array_split(indices, -(-len(indices) // 4)):
            valid = torch.from_numpy(blocks.segments[index] > 0).to(teacher.device)
            loading.logits_of(teacher, blocks.batch(index))
    finally:
        for hook in hooks:
            hook.remove()
        torch.nn.Module.to(teacher, "cpu")


def _select_units(scores: dict[tuple[str, int | None], torch.Tensor], before: Shape, after: Shape) -> KeptUnits:
    """The most important units, in the teacher's order."""

    def best(axis: str, layer: int | None, count: int, whole: int) -> torch.Tensor:
        return torch.arange(whole) if count == whole else _top(scores[axis, layer], count)

    heads, kv_heads = {}, {}
    for layer in after.layers:
        heads[layer], kv_heads[layer] = torch.arange(before.heads), torch.arange(before.kv_heads)
        if (after.heads, after.kv_heads) != (before.heads, before.kv_heads):
            # A key-value head is as important as the heads that would be kept with it.
            groups = scores["heads", layer].unflatten(0, (before.kv_heads, -1))
            best_of_group = groups.topk(after.heads // after.kv_heads)
            kv_heads[layer] = _top(best_of_group.values.sum(-1), after.kv_heads)
            inside = best_of_group.indices.sort().values[kv_heads[layer]]
            heads[layer] = (kv_heads[layer][:, None] * groups.shape[1] + inside).flatten()
    return KeptUnits(
        best("hidden", None, after.hidden, before.hidden),
        {layer: best("neurons", layer, after.neurons, before.neurons) for layer in after.layers},
        heads,
        kv_heads,
    )


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.topk(count).indices.sort().values


def _axes(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """The axes of each module that has weights of its own, by its path."""
    table = FAMILIES[model.config.model_type].axes
    found = {}
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            found[path] = next(axes for end, axes in table.items() if f".{path}".endswith(f".{end}"))
    return found


def _layer_number(path: str, layers: str) -> int | None:
    """The number of the layer with the module at `path`; None outside the layers."""
    if not path.startswith(f"{layers}."):
        return None
    return int(path.removeprefix(f"{layers}.").split(".")[0])


def _prune_tensor(
    whole: torch.Tensor, axes: tuple[str, ...], kept_units: KeptUnits, layer: int | None, before: Shape
) -> torch.Tensor:
    """A copy of a teacher's tensor with only the units to keep."""
    for axis, parts in enumerate(axes):
        length = whole.shape[axis] // max(1, len(parts.split()))  # of each part
        indices = []
        for number, part in enumerate(parts.split()):
            units = kept_units.units(part, layer)
            width = length // getattr(before, part)  # rows of one unit, such as the size of a head
            indices.append(number * length + (units[:, None] * width + torch.arange(width)).flatten())
        if indices:
            whole = whole.index_select(axis, torch.cat(indices))
    return whole.clone()
