"""Which architectures can be pruned, what the axes of their tensors are, and the sizes of teacher and student.

To support another architecture, add its `Family` to the table `FAMILIES`.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
from transformers import PretrainedConfig

from limbeck.distill.recipe.schema import Prune
from limbeck.registry.core.errors import BadInput


class Family(NamedTuple):
    """How to prune an architecture.

    Attributes:
        layers: path of the module that lists the layers.
        axes: the end of a module's path -> the units of its outputs and inputs (rows and columns of an embedding):
            hidden, neurons, heads, kv_heads, or "" for an axis that is never pruned. "heads heads heads" are three
            outputs side by side.
        neurons: the config's key for the number of neurons.
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
        "lm_head": ("", "hidden"),
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
    """The prunable sizes of a model: its layers, by their numbers in the teacher, and its widths."""

    layers: tuple[int, ...]
    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    head_dim: int


def shape_of(config: PretrainedConfig) -> Shape:
    """The teacher's shape. Raises BadInput for an architecture that cannot be pruned."""
    if config.model_type not in FAMILIES:
        raise BadInput(
            f"the teacher is a {config.model_type}, which cannot be pruned",
            fix=f"prunable teachers: {', '.join(FAMILIES)}; or give the student a config of its own",
        )
    if getattr(config, "quantization_config", None):
        raise BadInput(
            "the teacher's weights are quantized and cannot be pruned", fix="use the model before quantization"
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
    """The student's shape. Raises BadInput if the teacher cannot be pruned to it."""
    teacher = shape_of(config)
    layers = _pruned_layers(len(teacher.layers), spec)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and layers != teacher.layers[: len(layers)]:
        raise BadInput(
            "the teacher's attention depends on the number of its layer (scale_attn_by_inverse_layer_idx)",
            fix=f"keep the first ones: layers = {list(teacher.layers[: len(layers)])}",
        )
    sizes = {
        "hidden_size": (spec.hidden_size, teacher.hidden),
        "intermediate_size": (spec.intermediate_size, teacher.neurons),
        "num_attention_heads": (spec.num_attention_heads, teacher.heads),
        "num_key_value_heads": (spec.num_key_value_heads, teacher.kv_heads),
    }
    for key, (size, limit) in sizes.items():
        if size is not None and size > limit:
            raise BadInput(f"{key} = {size} is more than the teacher's {limit}", fix=f"give {limit} or less")
    heads = spec.num_attention_heads or teacher.heads
    kv_heads = spec.num_key_value_heads or _pruned_kv_heads(teacher, heads)
    group = teacher.heads // teacher.kv_heads
    if heads % kv_heads or heads // kv_heads > group:
        raise BadInput(
            f"{heads} attention heads cannot share {kv_heads} key-value heads: the teacher has {group} for each",
            fix=f"give num_attention_heads = {kv_heads * group} with num_key_value_heads = {kv_heads}",
        )
    hidden = spec.hidden_size or teacher.hidden
    if not FAMILIES[config.model_type].free_heads and hidden != heads * teacher.head_dim:
        raise BadInput(
            f"a {config.model_type} with hidden_size {hidden} has heads of size {hidden} / {heads}, and the teacher's "
            f"have size {teacher.head_dim}",
            fix=f"give hidden_size = {heads * teacher.head_dim} with num_attention_heads = {heads}",
        )
    return Shape(layers, hidden, spec.intermediate_size or teacher.neurons, heads, kv_heads, teacher.head_dim)


def _pruned_layers(count: int, spec: Prune) -> tuple[int, ...]:
    """The numbers of the layers to keep, of `count`. Evenly spread layers include the first and the last."""
    if spec.layers is not None:
        if not spec.layers or sorted(set(spec.layers)) != list(spec.layers) or not spec.layers[0] >= 0:
            raise BadInput(f"layers = {list(spec.layers)} must be ascending numbers from 0", fix="name each layer once")
        if spec.layers[-1] >= count:
            raise BadInput(f"layer {spec.layers[-1]} does not exist: the teacher's layers are 0 to {count - 1}")
        return spec.layers
    kept = spec.num_hidden_layers or count
    if kept > count:
        raise BadInput(f"num_hidden_layers = {kept} is more than the teacher's {count}", fix=f"give {count} or less")
    return tuple(int(layer) for layer in np.linspace(0, count - 1, kept).round())


def _pruned_kv_heads(teacher: Shape, heads: int) -> int:
    """The default number of key-value heads: one for each head if the teacher has that, else the teacher's number."""
    return heads if teacher.kv_heads == teacher.heads else teacher.kv_heads


def student_config(config: PretrainedConfig, shape: Shape) -> PretrainedConfig:
    """The teacher's config with the sizes of `shape`."""
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
