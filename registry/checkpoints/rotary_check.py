"""Compares the rotary tables of a loaded model with what config.json states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from limbeck.registry.checkpoints.rotary import (
    COMMON,
    TYPES,
    USED,
    Contradiction,
    NotRead,
    Parameters,
    Table,
    rotary_pairs,
    rotary_table,
    stated_parameters,
    unused_parameters,
)
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

EQUAL = "equal to config.json"
NO_TABLE = "no rotary table"
SUFFIX, SINES = "inv_freq", "embed_positions"  # names of the buffers
CHANGED_THETA = {"cohere", "falcon_h1", "modernbert-decoder", "olmo3", "persimmon"}
DEFAULT_THETA = {"gptj": 10000.0, "codegen": 10000.0}  # of the families whose code has the number
TOLERANCE = 1e-5  # relative; float32 powers differ by about 1e-6


class _Loaded(NamedTuple):
    """A rotary table of the loaded model. `layer_type` is None if the model has one table for all layers."""

    module: nn.Module
    layer_type: str | None
    frequencies: torch.Tensor
    scaling: float


def check_rotary(model: PreTrainedModel, raw: dict[str, Any], file: str) -> str:
    """Compare each rotary table of a model with what config.json states.

    Args:
        raw: config.json, or its part about the language model; keys it lacks have the defaults of the config's class.
        file: what messages call config.json.

    Returns EQUAL, NO_TABLE, or "not checked: " and the reason. Raises BadInput with both values if they differ, or if
    config.json contradicts itself.
    """
    config = model.config.get_text_config()
    tables = [*_loaded_tables(model)]
    if not tables:
        return NO_TABLE
    reasons = []
    try:
        for table in tables:
            try:
                _check_table(table, raw, config, file)
            except NotRead as reason:
                reasons.append(str(reason))
    except Contradiction as statements:
        raise BadInput(
            f"{file} contradicts itself: {statements.args[0]}, but {statements.args[1]}",
            fix="delete the one that the model was not trained with",
        ) from None
    return f"not checked: {reasons[0]}" if reasons else EQUAL


def _loaded_tables(model: nn.Module) -> Iterator[_Loaded]:
    """Each different rotary table of the model; some have one module per layer."""
    seen = set()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            table = _loaded_table(module, name, buffer)
            if table is None:
                continue
            key = (type(module), table.layer_type, tuple(table.frequencies.tolist()))
            if key not in seen:
                seen.add(key)
                yield table


def _loaded_table(module: nn.Module, name: str, buffer: torch.Tensor) -> _Loaded | None:
    if name == SINES and "Rotary" in type(module).__name__:  # GPT-J and CodeGen: sines and cosines by position
        sine, cosine = buffer[1].chunk(2)
        return _Loaded(module, None, sine.atan2(cosine), 1.0)
    if not name.endswith(SUFFIX) or "original" in name:
        return None
    layer_type = name[: -len(SUFFIX)].rstrip("_") or None
    prefix = f"{layer_type}_" if layer_type else ""
    return _Loaded(module, layer_type, buffer.flatten(), float(getattr(module, f"{prefix}attention_scaling", 1.0)))


def _check_table(loaded: _Loaded, raw: dict[str, Any], config: Any, file: str) -> None:
    stated = stated_parameters(raw, loaded.layer_type)
    used = _loaded_parameters(config, loaded.layer_type)
    parameters = used | {name: value for name, (_, value) in stated.items()}
    rope_type = parameters.get("rope_type", "default")
    _refuse_unused(stated, rope_type, file)
    if "rope_theta" not in parameters:
        raise NotRead("neither config.json nor its class has rope_theta")
    if "rope_theta" not in stated and config.model_type in CHANGED_THETA:
        raise NotRead("config.json has no rope_theta, and transformers 5 has another default than transformers 4")
    size = _head_size(raw, config, loaded, parameters)
    max_length = _number(raw, config, "max_position_embeddings") or 0
    _compare(rotary_table(parameters, size, max_length), loaded, stated, used, file)
    limits = {"longrope": parameters.get("original_max_position_embeddings"), "dynamic": max_length}
    limit = limits.get(rope_type)
    if limit:
        length = 2 * limit
        table = rotary_table(parameters, size, max_length, length)
        _compare(table, _at_length(loaded, length), stated, used, file)


def _refuse_unused(stated: dict[str, tuple[str, Any]], rope_type: str, file: str) -> None:
    """Refuse parameters of other types; raise NotRead for unknown ones."""
    for name, (key, value) in unused_parameters(stated, rope_type).items():
        if any(name in names for names in USED.values()):
            raise BadInput(
                f"{file}: {key} is {value!r}, which rope_type {rope_type!r} does not use",
                fix="delete it, or set the rope_type that the model was trained with",
            )
        raise NotRead(f"{key} is not known")


def _loaded_parameters(config: Any, layer_type: str | None) -> Parameters:
    """What the loaded config says of a table; empty if it does not say."""
    parameters = _attribute(config, "rope_parameters") or {}
    if layer_type is not None:
        parameters = parameters.get(layer_type) or {}
    names = COMMON.union(*USED.values())
    found = {name: value for name, value in parameters.items() if name in names and value is not None}
    if config.model_type in DEFAULT_THETA:
        found = {"rope_theta": DEFAULT_THETA[config.model_type]} | found
    return found | ({"rope_type": TYPES.get(found["rope_type"], found["rope_type"])} if "rope_type" in found else {})


def _number(raw: dict[str, Any], config: Any, name: str) -> int | None:
    value = raw.get(name)
    return value if value is not None else _attribute(config, name)


def _attribute(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a config whose layers differ raises an error of its own
        return None


def _head_size(raw: dict[str, Any], config: Any, loaded: _Loaded, parameters: Parameters) -> int:
    """The size of the part of a head that may turn. Families name it differently, and some have several.

    Returns the one that gives as many frequencies as the loaded table has; if none does, the head's size.
    """
    sizes = [_number(raw, config, name) for name in ("head_dim", "qk_rope_head_dim", "rotary_dim")]
    hidden, heads = _attribute(config, "hidden_size"), _attribute(config, "num_attention_heads")
    if not sizes[0] and hidden and heads:
        sizes[0] = hidden // heads
    if loaded.layer_type is not None:
        per_layer = raw.get("per_layer_config") or {}
        sizes += [raw.get("global_head_dim"), *(values.get("head_dim") for values in per_layer.values())]
    known = [size for size in sizes if size]
    if not known:
        raise NotRead("neither config.json nor its class has the size of a head")
    pairs = loaded.frequencies.numel()
    return next((size for size in known if rotary_pairs(parameters, size) == pairs), known[0])


def _at_length(loaded: _Loaded, length: int) -> _Loaded:
    """The table that the model uses for a text of `length` tokens. Leaves the model as it is."""
    import torch

    module = copy.deepcopy(loaded.module)
    arguments = (loaded.layer_type,) if loaded.layer_type else ()
    module(torch.zeros(1), torch.tensor([[length - 1]]), *arguments)
    name = f"{loaded.layer_type}_{SUFFIX}" if loaded.layer_type else SUFFIX
    return loaded._replace(frequencies=getattr(module, name).flatten())


def _compare(table: Table, loaded: _Loaded, stated: dict[str, tuple[str, Any]], used: Parameters, file: str) -> None:
    """Raise BadInput if the two tables differ: with the parameters that differ, or else with the first frequency."""
    actual = loaded.frequencies.double().tolist()
    if len(actual) == len(table.frequencies):
        pairs = [*zip(table.frequencies, actual, strict=True), (table.scaling, loaded.scaling)]
        different = [pair for pair in pairs if abs(pair[0] - pair[1]) > TOLERANCE * abs(pair[0])]
        if not different:
            return
        numbers = "a frequency or scaling of {:.6g}, the loaded model {:.6g}".format(*different[0])
    else:
        numbers = f"{2 * len(table.frequencies)} rotary dimensions, the loaded model {2 * len(actual)}"
    where = f" ({loaded.layer_type})" if loaded.layer_type else ""
    values = [
        f"{key} is {value!r} in the file, {used.get(name)!r} in the loaded model"
        for name, (key, value) in stated.items()
        if used.get(name) != value
    ]
    raise BadInput(
        f"{file}: the loaded model's rotary table differs{where}: config.json gives {numbers}"
        + "".join(f"; {value}" for value in values),
        fix="transformers reads this file differently: write its rotary parameters as rope_parameters, "
        "as save_pretrained of transformers 5 does",
    )
