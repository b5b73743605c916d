"""Keys of config.json that no code of the model's family reads."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.registry.checkpoints.rotary import COMMON, FORMS, ROPE_BLOCKS, USED
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Names that change the numbers of a model.
DANGEROUS = re.compile(
    r"rope|rotary|_scaling$|_theta$|sliding_window|attention_window|softcap|_multiplier$|_scalar$|^alibi$"
    r"|^(.*_)?bias$|head_dim|qk_(layer)?norm|query_pre_attn|parallel_(attn|residual)|layer_norm_before"
    r"|norm_eps|norm_epsilon|hidden_act|activation_function"
)
# A family that reads one of these ignores the others: a file that states both is read as it was meant.
SYNONYMS = (re.compile(r"norm_eps|norm_epsilon"), re.compile(r"hidden_act|activation_function"))
NEUTRAL: tuple[Any, ...] = (0, 1, "", "default", "none", [], {})
UNUSED_THETA = 10000.0  # some families without rotary tables state the usual base
# Metadata, settings of training and of other programs, which change no logits.
HARMLESS = re.compile(
    r"^_|^transformers|^torch_dtype$|^auto_map$|dropout|_pdrop$|^initializer|_init$|_token_id$|^task_specific|^summary_"
    r"|^unsloth|^quantization|^is_llama_config$|_fusion$|^use_cache$|^pretraining_tp$|^tokenizer_class$|^n_ctx$"
)


def refuse_unread_keys(raw: dict[str, Any], model: PreTrainedModel, has_rotary: bool, file: str) -> list[str]:
    """Find the keys of config.json that neither the config's class nor the model's code reads.

    Args:
        raw: config.json, or its part about the language model.
        has_rotary: whether the model has rotary tables, which `check_rotary` compares with their keys.
        file: what messages call config.json.

    Returns the unread keys that change no numbers by their name. Raises BadInput for those that do, unless their value
    is the neutral one.
    """
    config = model.config.get_text_config()
    known = _known_keys(config, has_rotary)
    source = _family_source(type(config), type(model))
    unread = [(key, value) for key, value in _leaves(raw) if _name(key) not in known and not _mentions(source, key)]
    dangerous = [(key, value) for key, value in unread if _is_dangerous(key, value, raw, known)]
    if dangerous:
        stated = ", ".join(f"{key} = {value!r}" for key, value in dangerous)
        raise BadInput(
            f"{file}: no code of {type(model).__name__} reads {stated}: the model would be another than the file says",
            fix="set the model_type or the keys of the family that the model was trained with; delete a key that it "
            "was not trained with",
        )
    return sorted(key for key, _ in unread if not HARMLESS.search(key))


def _leaves(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The top-level keys, and the keys of the rotary parameters by their path."""
    for key, value in raw.items():
        if key not in ROPE_BLOCKS:
            yield key, value
        elif isinstance(value, dict):
            tables = {f"{key}.{name}": table for name, table in value.items() if isinstance(table, dict)}
            for path, table in (tables or {key: value}).items():
                yield from ((f"{path}.{name}", found) for name, found in table.items())


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _known_keys(config: PretrainedConfig, has_rotary: bool) -> set[str]:
    """The keys that the class, or transformers for every class, reads."""
    from transformers import GenerationConfig

    own = {field.name for field in fields(config)} if is_dataclass(config) else set()
    aliases = {*config.attribute_map, *config.attribute_map.values()}
    rotary = COMMON.union(FORMS, *USED.values()) | {"type", "finetuned"} if has_rotary else set()
    return own | aliases | rotary | set(GenerationConfig().to_dict()) | {"model_type", "num_labels"}


def _family_source(*classes: type) -> str:
    """The Python files that define the classes and those that they derive from, without transformers' base classes."""
    modules = dict.fromkeys(parent.__module__ for cls in classes for parent in cls.__mro__)
    general = ("transformers.configuration_utils", "transformers.modeling_utils")
    family = [name for name in modules if name not in general and not name.startswith(("torch.", "builtins"))]
    return "\n".join(_module_source(name) for name in family if _is_family(name))


def _is_family(module: str) -> bool:
    return module.startswith(("transformers.models.", "transformers_modules."))


@lru_cache(maxsize=64)
def _module_source(name: str) -> str:
    """The module's file. For code that comes with a model, all files beside it, which it may import."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file:
        return ""
    files = Path(file).parent.glob("*.py") if name.startswith("transformers_modules.") else [Path(file)]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def _mentions(source: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(_name(key))}\b", source) is not None


def _is_dangerous(key: str, value: Any, raw: dict[str, Any], known: Iterable[str]) -> bool:
    if not DANGEROUS.search(key) or _is_neutral(key, value):
        return False
    if "sliding_window" in key:
        return raw.get("use_sliding_window") is not False and not _covers_everything(value, raw)
    for synonyms in SYNONYMS:
        if synonyms.search(key):
            return not any(synonyms.search(other) for other in raw if other in known)
    return True


def _is_neutral(key: str, value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return not value
    return value in NEUTRAL or (_name(key) == "rope_theta" and value == UNUSED_THETA)


def _covers_everything(window: Any, raw: dict[str, Any]) -> bool:
    longest = raw.get("max_position_embeddings")
    return isinstance(window, int) and isinstance(longest, int) and window >= longest
