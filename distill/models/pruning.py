"""A student cut from its teacher: some of the layers, and of those the channels, neurons and heads that do most.

Layers are named or evenly spread, as in DistilBERT (arXiv 1910.01108). Width goes by activations on training text,
as in Minitron (arXiv 2407.14679). What is cut where follows from the table of axes below and the tensors' shapes.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck.distill.data.blocks import Blocks
from limbeck.distill.models import loading
from limbeck.distill.recipe.schema import Prune
from limbeck.registry.core.errors import BadInput


class Family(NamedTuple):
    """How an architecture is cut.

    Attributes:
        layers: the module that lists the layers.
        axes: the end of a module's path -> what its outputs and its inputs are (of an embedding: rows and columns):
            hidden, neurons, heads, kv_heads, or nothing that is ever cut. Outputs side by side: "heads heads heads".
        neurons: the config's key for them.
        free_heads: whether a head may have another size than hidden_size / num_attention_heads.
    """

    layers: str
    axes: dict[str, tuple[str, ...]]
    neurons: str = "intermediate_size"
    free_heads: bool = True


LLAMA = Family(
    "model.layers",
    {
        "embed_tokens": ("", "hidden"),
        "input_layernorm": ("hidden",),
        "q_proj": ("heads", "hidden"),
        "k_proj": ("kv_heads", "hidden"),
        "v_proj": ("kv_heads", "hidden"),
        "q_norm": ("",),
        "k_norm": ("",),
        "o_proj": ("hidden", "heads"),
        "post_attention_layernorm": ("hidden",),
        "gate_proj": ("neurons", "hidden"),
        "up_proj": ("neurons", "hidden"),
        "down_proj": ("hidden", "neurons"),
        "model.norm": ("hidden",),
        "lm_head": ("", "hidden"),
    },
)
GPT2 = Family(
    "transformer.h",
    {
        "wte": ("", "hidden"),
        "wpe": ("", "hidden"),
        "ln_1": ("hidden",),
        "c_attn": ("heads heads heads", "hidden"),
        "attn.c_proj": ("hidden", "heads"),
        "ln_2": ("hidden",),
        "c_fc": ("neurons", "hidden"),
        "mlp.c_proj": ("hidden", "neurons"),
        "ln_f": ("hidden",),
        "lm_head": ("", "hidden"),
    },
    neurons="n_inner",
    free_heads=False,
)
GPT_NEOX = Family(
    "gpt_neox.layers",
    {
        "embed_in": ("", "hidden"),
        "input_layernorm": ("hidden",),
        "query_key_value": ("heads", "hidden"),
        "attention.dense": ("hidden", "heads"),
        "post_attention_layernorm": ("hidden",),
        "dense_h_to_4h": ("neurons", "hidden"),
        "dense_4h_to_h": ("hidden", "neurons"),
        "final_layer_norm": ("hidden",),
        "embed_out": ("", "hidden"),
    },
    free_heads=False,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
}


class Shape(NamedTuple):
    """What of a model may be cut: its layers by their numbers in the teacher, and the widths."""

    layers: tuple[int, ...]
    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    head_dim: int


def shape_of(config: PretrainedConfig) -> Shape:
    """The teacher's shape. Raises BadInput for an architecture that cannot be cut."""
    if config.model_type not in FAMILIES:
        raise BadInput(
            f"the teacher is a {config.model_type}, which cannot be cut",
            fix=f"teachers that can: {', '.join(FAMILIES)}; or give the student a config of its own",
        )
    if getattr(config, "quantization_config", None):
        raise BadInput(
            "the teacher's weights are quantized, and those cannot be cut", fix="take the model it came from"
        )
    heads = config.num_attention_heads
    return Shape(
        layers=tuple(range(config.num_hidden_layers)),
        hidden=config.hidden_size,
        neurons=getattr(config, FAMILIES[config.model_type].neurons) or 4 * config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def pruned_shape(config: PretrainedConfig, spec: Prune) -> Shape:
    """The student's shape. Raises BadInput where the teacher cannot be cut so."""
    teacher = shape_of(config)
    layers = _pruned_layers(len(teacher.layers), spec)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and layers != teacher.layers[: len(layers)]:
        raise BadInput(
            "the teacher's attention depends on the number of its layer (scale_attn_by_inverse_layer_idx)",
            fix=f"keep the first ones: layers = {list(teacher.layers[: len(layers)])}",
        )
    asked = {
        "hidden_size": (spec.hidden_size, teacher.hidden),
        "intermediate_size": (spec.intermediate_size, teacher.neurons),
        "num_attention_heads": (spec.num_attention_heads, teacher.heads),
        "num_key_value_heads": (spec.num_key_value_heads, teacher.kv_heads),
    }
    for key, (size, most) in asked.items():
        if size is not None and size > most:
            raise BadInput(f"{key} = {size} is more than the teacher's {most}", fix=f"give {most} or less")
    heads = spec.num_attention_heads or teacher.heads
    kv_heads = spec.num_key_value_heads or _pruned_kv_heads(teacher, heads)
    group = teacher.heads // teacher.kv_heads
    if heads % kv_heads or heads // kv_heads > group:
        raise BadInput(
            f"{heads} attention heads cannot share {kv_heads} key-value heads: the teacher has {group} to each",
            fix=f"give num_attention_heads = {kv_heads * group} with num_key_value_heads = {kv_heads}",
        )
    hidden = spec.hidden_size or teacher.hidden
    if not FAMILIES[config.model_type].free_heads and hidden != heads * teacher.head_dim:
        raise BadInput(
            f"a {config.model_type} of hidden_size {hidden} has heads of {hidden} / {heads} and the teacher's are of "
            f"{teacher.head_dim}",
            fix=f"give hidden_size = {heads * teacher.head_dim} with num_attention_heads = {heads}",
        )
    return Shape(layers, hidden, spec.intermediate_size or teacher.neurons, heads, kv_heads, teacher.head_dim)


def _pruned_layers(count: int, spec: Prune) -> tuple[int, ...]:
    """The layers that stay, of `count`; evenly spread, the first and the last are among them."""
    if spec.layers is not None:
        if not spec.layers or sorted(set(spec.layers)) != list(spec.layers) or not spec.layers[0] >= 0:
            raise BadInput(f"layers = {list(spec.layers)} has to go up, from 0 on", fix="each layer stays once")
        if spec.layers[-1] >= count:
            raise BadInput(f"layer {spec.layers[-1]} is not there: the teacher's are 0 to {count - 1}")
        return spec.layers
    kept = spec.num_hidden_layers or count
    if kept > count:
        raise BadInput(f"num_hidden_layers = {kept} is more than the teacher's {count}", fix=f"give {count} or less")
    return tuple(int(layer) for layer in np.linspace(0, count - 1, kept).round())


def _pruned_kv_heads(teacher: Shape, heads: int) -> int:
    """Key-value heads where only `heads` is given: one to each head where the teacher has it so, else as many."""
    return heads if teacher.kv_heads == teacher.heads else teacher.kv_heads


def student_config(config: PretrainedConfig, shape: Shape) -> PretrainedConfig:
    """The teacher's config, cut to `shape`."""
    made = copy.deepcopy(config)
    made.num_hidden_layers = len(shape.layers)
    if getattr(config, "layer_types", None):
        made.layer_types = [config.layer_types[layer] for layer in shape.layers]
    made.hidden_size = shape.hidden
    neurons = FAMILIES[config.model_type].neurons
    if getattr(config, neurons) or shape.neurons != 4 * shape.hidden:
        setattr(made, neurons, shape.neurons)
    made.num_attention_heads = shape.heads
    if hasattr(config, "num_key_value_heads"):
        made.num_key_value_heads = shape.kv_heads
    if getattr(config, "head_dim", None) or shape.hidden != shape.heads * shape.head_dim:
        made.head_dim = shape.head_dim
    return made


# Shown a module's path, what comes by there (`hidden`: what a norm puts out; `norm input`; `neurons` and `heads`: what
# their last projection takes), its values (n, T, C), and which tokens are no padding (n, T).
ActivationCallback = Callable[[str, str, torch.Tensor, torch.Tensor], None]


class KeptUnits(NamedTuple):
    """What stays of the teacher: numbers of channels, and by layer of neurons and heads; each (n,), going up."""

    hidden: torch.Tensor
    neurons: dict[int, torch.Tensor]
    heads: dict[int, torch.Tensor]
    kv_heads: dict[int, torch.Tensor]

    def units(self, axis: str, layer: int | None) -> torch.Tensor:
        if axis == "hidden":
            return self.hidden
        assert layer is not None
        units: torch.Tensor = getattr(self, axis)[layer]
        return units


def prune(teacher: PreTrainedModel, spec: Prune, blocks: Blocks) -> PreTrainedModel:
    """The student, with the weights of the teacher that it keeps, in the teacher's dtype.

    A norm divides by the size of a token's channels, which is another one without those that are cut: its weights
    make up for the mean change, so that cutting channels that are zero changes nothing.

    Args:
        blocks: training text; importance is measured on its first `spec.calibration_blocks`.

    Raises:
        BadInput: the teacher cannot be cut so.
    """
    before, after = shape_of(teacher.config), pruned_shape(teacher.config, spec)
    measured = np.arange(min(spec.calibration_blocks, len(blocks.ids)))
    narrower = after[1:] != before[1:]
    scores = importance(teacher, blocks, measured) if narrower else {}
    kept = _select_units(scores, before, after)
    scales = _norm_scales(teacher, blocks, measured, kept.hidden) if after.hidden < before.hidden else {}
    student = AutoModelForCausalLM.from_config(student_config(teacher.config, after), dtype=teacher.dtype)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    layers = FAMILIES[teacher.config.model_type].layers
    for path, axes in _axes(student).items():
        layer, source = _layer(path, layers), path
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
    """How much each channel, neuron and head does: (what, layer) -> (n,) float64; channels have no layer.

    The size of its activation, as a mean over the tokens of a block and an L2 norm over blocks (Minitron's best):
    of channels what the norms put out, summed over norms; of neurons and heads what their last projection takes.
    """
    layers, heads = FAMILIES[teacher.config.model_type].layers, shape_of(teacher.config).heads
    squares: dict[tuple[str, str], Any] = defaultdict(float)

    def see(path: str, what: str, value: torch.Tensor, valid: torch.Tensor) -> None:
        if what == "norm input":
            return
        value = value.double()
        size = value.unflatten(-1, (heads, -1)).norm(dim=-1) if what == "heads" else value.abs()
        means = (size * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        squares[what, path] += means.square().sum(0)

    _run(teacher, blocks, indices, see)
    scores: dict[tuple[str, int | None], Any] = defaultdict(float)
    for (what, path), square in squares.items():
        scores[what, None if what == "hidden" else _layer(path, layers)] += square.sqrt().cpu()
    return scores


def _norm_scales(teacher: PreTrainedModel, blocks: Blocks, indices: np.ndarray, kept: torch.Tensor) -> dict[str, float]:
    """What the weights of each norm are multiplied by: the mean ratio of what it divides by, cut and whole."""
    ratios: dict[str, list[torch.Tensor]] = defaultdict(list)
    norms = dict(teacher.named_modules())

    def see(path: str, what: str, value: torch.Tensor, valid: torch.Tensor) -> None:
        if what == "norm input":
            centred = isinstance(norms[path], torch.nn.LayerNorm)
            ratio = _root_mean_square(value[..., kept], centred) / _root_mean_square(value, centred)
            ratios[f"{path}.weight"].append(ratio[valid])

    _run(teacher, blocks, indices, see)
    # A token whose channels are all zero, as padding's are, has no ratio.
    return {name: float(torch.cat(each).nanmean().nan_to_num(nan=1.0)) for name, each in ratios.items()}


def _root_mean_square(value: torch.Tensor, centred: bool) -> torch.Tensor:
    value = value.double()
    return (value - value.mean(-1, keepdim=True) if centred else value).square().mean(-1).sqrt()


@torch.inference_mode()
def _run(teacher: PreTrainedModel, blocks: Blocks, indices: np.ndarray, on_activation: ActivationCallback) -> None:
    """Run the teacher over the blocks at `indices` and show `on_activation` what comes by."""
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
    """The units with the highest scores, in the teacher's order."""

    def best(what: str, layer: int | None, count: int, whole: int) -> torch.Tensor:
        return torch.arange(whole) if count == whole else _top(scores[what, layer], count)

    heads, kv_heads = {}, {}
    for layer in after.layers:
        heads[layer], kv_heads[layer] = torch.arange(before.heads), torch.arange(before.kv_heads)
        if (after.heads, after.kv_heads) != (before.heads, before.kv_heads):
            # A key-value head is worth what the heads are that would stay with it.
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
    """Of each module with weights of its own, by its path, what its axes are."""
    table = FAMILIES[model.config.model_type].axes
    found = {}
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            found[path] = next(axes for end, axes in table.items() if f".{path}".endswith(f".{end}"))
    return found


def _layer(path: str, layers: str) -> int | None:
    """The number of the layer that the module at `path` belongs to."""
    return int(path.removeprefix(f"{layers}.").split(".")[0]) if path.startswith(f"{layers}.") else None


def _prune_tensor(
    whole: torch.Tensor, axes: tuple[str, ...], kept: KeptUnits, layer: int | None, before: Shape
) -> torch.Tensor:
    """A tensor of the teacher without what does not stay."""
    for axis, parts in enumerate(axes):
        each = whole.shape[axis] // max(1, len(parts.split()))
        places = []
        for number, what in enumerate(parts.split()):
            units = kept.units(what, layer)
            width = each // getattr(before, what)  # rows of one unit: of a head, its size
            places.append(number * each + (units[:, None] * width + torch.arange(width)).flatten())
        whole = whole.index_select(axis, torch.cat(places)) if places else whole
    return whole.clone()
