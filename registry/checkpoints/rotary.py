"""Rotary tables as config.json states them, computed without transformers. Plain numbers: needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Parameters = dict[str, Any]

# Top-level keys of config.json, in the forms of transformers 4 and of the first families with rotary tables.
TOP_LEVEL = {
    "rope_theta": ("rope_theta", "rotary_emb_base", "global_rope_theta"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}
ROPE_BLOCKS = ("rope_parameters", "rope_scaling")  # of transformers 5, of transformers 4
LOCAL_THETA = ("rope_local_base_freq", "local_rope_theta")  # of the layers with a sliding window
FORMS = {*ROPE_BLOCKS, *LOCAL_THETA}.union(*TOP_LEVEL.values())  # every top-level key of rotary tables
TYPES = {"su": "longrope", "mrope": "default"}  # other names of a type
COMMON = {"rope_theta", "rope_type", "partial_rotary_factor"}
USED = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "alpha"},
    "proportional": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"}
    | {"original_max_position_embeddings"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"},
}
NO_EFFECT = {"mrope_section", "mrope_interleaved", "finetuned", "original_max_position_embeddings"}  # on the table
NO_EFFECT |= {
    "max_position_embeddings",
    "llama_4_scaling_beta",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


class Contradiction(Exception):
    """config.json gives one parameter two values. Args: the two statements, such as "rope_theta is 10000.0"."""


class NotRead(Exception):
    """The table cannot be computed from config.json. Args: the reason."""


class Table(NamedTuple):
    """One rotary table.

    Attributes:
        parameters: rope_type, rope_theta and the others of its type.
        frequencies: radians per position, of each pair of dimensions.
        scaling: factor of cosine and sine.
    """

    parameters: Parameters
    frequencies: list[float]
    scaling: float


def stated_parameters(raw: dict[str, Any], layer_type: str | None = None) -> dict[str, tuple[str, Any]]:
    """Collect the rotary parameters that config.json states.

    Args:
        raw: config.json, or its part about the language model.
        layer_type: "full_attention", "sliding_attention" ...; None if the model has one table.

    Returns each parameter with the key that states it and its value. Raises Contradiction if two keys disagree.
    """
    stated: dict[str, tuple[str, Any]] = {}

    def add(name: str, key: str, value: Any) -> None:
        if value is None:
            return
        if name in stated and stated[name][1] != value:
            other, old = stated[name]
            raise Contradiction(f"{other} is {old!r}", f"{key} is {value!r}")
        stated.setdefault(name, (key, value))

    for block in ROPE_BLOCKS:
        for key, value in _block(raw, block, layer_type):
            name = key.rpartition(".")[2]
            add("rope_type" if name == "type" else name, key, value)
    for name, keys in TOP_LEVEL.items():
        for key in _theta_keys(raw, layer_type) if name == "rope_theta" else keys:
            if raw.get(key) not in _values_by_layer_type(raw, name):  # there it may stand for another layer type
                add(name, key, raw.get(key))
    return stated


def _block(raw: dict[str, Any], block: str, layer_type: str | None) -> list[tuple[str, Any]]:
    """The keys, with their path in config.json, and the values of rope_parameters or rope_scaling."""
    values = raw.get(block)
    if not isinstance(values, dict):
        return []
    if _is_nested(values):
        values, block = _nested(values, block, layer_type)
    elif layer_type is not None and _is_local(layer_type):
        return []  # as transformers 4 meant it: the scaling of the layers with full attention
    return [(f"{block}.{key}", _plain_type(key, value, values)) for key, value in values.items()]


def _nested(values: dict[str, Any], block: str, layer_type: str | None) -> tuple[dict[str, Any], str]:
    """The table of a layer type; if the model has one for all layers, the one that all layer types state."""
    if layer_type is not None:
        return values.get(layer_type) or {}, f"{block}.{layer_type}"
    tables = {name: table for name, table in values.items() if isinstance(table, dict)}
    name, table = next(iter(tables.items()))
    if any(other != table for other in tables.values()):
        raise NotRead(f"{block} has one table per layer type, the model one for all")
    return table, f"{block}.{name}"


def _plain_type(key: str, value: Any, values: dict[str, Any]) -> Any:
    """The usual name of a rope type. Phi-3's first configs call longrope "yarn"."""
    if key not in ("type", "rope_type"):
        return value
    return "longrope" if value == "yarn" and "short_factor" in values else TYPES.get(value, value)


def _values_by_layer_type(raw: dict[str, Any], name: str) -> list[Any]:
    tables = (raw.get("rope_parameters") or {}).values()
    return [table.get(name) for table in tables if isinstance(table, dict)]


def _is_nested(values: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in values.values())


def _is_local(layer_type: str) -> bool:
    return layer_type.startswith("sliding")


def _theta_keys(raw: dict[str, Any], layer_type: str | None) -> tuple[str, ...]:
    if layer_type is not None and _is_local(layer_type):
        local = tuple(key for key in LOCAL_THETA if raw.get(key) is not None)
        return local or ("rope_theta",)
    return TOP_LEVEL["rope_theta"]


def unused_parameters(stated: dict[str, tuple[str, Any]], rope_type: str) -> dict[str, tuple[str, Any]]:
    """The stated parameters that a type of table does not use, and that are not known to have no effect."""
    known = COMMON | USED.get(rope_type, set()) | NO_EFFECT
    return {name: found for name, found in stated.items() if name not in known and found[1] not in (1, 1.0, [], {})}


def rotary_pairs(parameters: Parameters, head_size: int) -> int:
    """The number of frequencies of a table: one per pair of rotated dimensions."""
    share = 1.0 if parameters.get("rope_type") == "proportional" else parameters.get("partial_rotary_factor", 1.0)
    return (int(head_size * share) + 1) // 2


def rotary_table(parameters: Parameters, head_size: int, max_length: int, length: int = 1) -> Table:
    """Compute the table of a rope type.

    Args:
        parameters: of the table, complete.
        head_size: dimensions of an attention head.
        max_length: max_position_embeddings.
        length: tokens of the text, on which dynamic and longrope depend.

    Raises NotRead for an unknown type or a missing parameter.
    """
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in RULES:
        raise NotRead(f"rope_type {rope_type!r} is not known")
    size = _Sizes(head_size, int(head_size * parameters.get("partial_rotary_factor", 1.0)), max_length, length)
    try:
        frequencies, scaling = RULES[rope_type](parameters, size)
    except KeyError as missing:
        raise NotRead(f"rope_type {rope_type!r} without {missing.args[0]}") from None
    return Table(parameters, frequencies, scaling)


class _Sizes(NamedTuple):
    head: int
    rotary: int
    max_length: int
    length: int


def _plain(theta: float, rotary: int, base: int | None = None) -> list[float]:
    return [theta ** (-i / (base or rotary)) for i in range(0, rotary, 2)]


def _default(parameters: Parameters, size: _Sizes) -> tuple[list[float], float]:
    return _plain(parameters["rope_theta"], size.rotary), 1.0


def _linear(parameters: Parameters, size: _Sizes) -> tuple[list[float], float]:
    return [f / parameters["factor"] for f in _plain(parameters["rope_theta"], size.rotary)], 1.0


def _proportional(parameters: Parameters, size: _Sizes) -> tuple[list[float], float]:
    """The rotated share of the head has the frequencies of the whole head, the rest does not turn."""
    rotary = 2 * int(parameters.get("partial_rotary_factor", 1.0) * size.head // 2)
    frequencies = [f / parameters.get("factor", 1.0) for f in _plain(parameters["rope_theta"], rotary, size.head)]
    return frequencies + [0.0] * (size.head // 2 - len(frequencies)), 1.0


def _dynamic(parameters: Parameters, size: _Sizes) -> tuple[list[float], float]:
    """The base grows with the length, or by a fixed alpha (HunYuan)."""
    factor, stretch = parameters.get("factor", 1.0), max(size.length, size.max_length) / size.max_length
    growth = parameters.get("alpha") or factor * stretch - (factor - 1)
    return _plain(parameters["rope_theta"] * growth ** (size.rotary / (size.rotary - 2)), size.rotary), 1.0


def _llama3(parameters: Parameters, size: _Sizes) -> tuple[list[float], float]:
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = parameters["original_max_position_embeddings"]

    def scaled(frequency: float) -> float:
        turns = original * frequency / (2 * math.pi)  # over the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1 - smooth) * frequency / factor + smooth * frequency

    return [scaled(f) for f in _plain(parameters["rope_theta"], size.rotary)], 1.0


def _yarn(parameters: Parameters, size: _Sizes) -> tuple[list[float], float]:
    """arXiv 2309.00071, with the attention factor of DeepSeek's mscale."""
    theta, original = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or size.max_length / original

    def boundary(turns: float) -> float:
        return size.rotary * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = boundary(parameters.get("beta_fast") or 32), boundary(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size.rotary - 1)
    width = high - low or 0.001
    frequencies = []
    for i, frequency in enumerate(_plain(theta, size.rotary)):
        interpolated = min(max((i - low) / width, 0.0), 1.0)
        frequencies.append(frequency / factor * interpolated + frequency * (1 - interpolated))
    return frequencies, _yarn_scaling(parameters, factor)


def _yarn_scaling(parameters: Parameters, factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(parameters["mscale"]) / mscale(parameters["mscale_all_dim"])
    return mscale(1.0)


def _longrope(parameters: Parameters, size: _Sizes) -> tuple[list[float], float]:
    """arXiv 2402.13753: one list of factors up to the original context, another beyond it."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or size.max_length / original
    divisors = parameters["long_factor" if size.length > original else "short_factor"]
    plain = _plain(parameters["rope_theta"], size.rotary)
    if len(divisors) != len(plain):
        raise NotRead(f"{len(divisors)} factors of longrope for {len(plain)} frequencies")
    frequencies = [f / d for f, d in zip(plain, divisors, strict=True)]
    if parameters.get("attention_factor") is not None:
        return frequencies, float(parameters["attention_factor"])
    return frequencies, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


RULES: dict[str, Callable[[Parameters, _Sizes], tuple[list[float], float]]] = {
    "default": _default,
    "linear": _linear,
    "proportional": _proportional,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
