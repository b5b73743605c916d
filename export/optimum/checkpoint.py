"""Write a model of transformers 5 as a checkpoint that transformers 4 reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Keys of transformers 5 that transformers 4 does not need, or that would make it load something else.
DROPPED = {"_name_or_path", "auto_map", "dtype", "quantization_config", "rope_parameters"}
NAMES_TYPE = {"olmo", "olmo2", "phi3"}  # their configs have `type` in `rope_scaling`, others `rope_type`


def write_checkpoint(torch_model: Any, folder: Path) -> None:
    """Write config.json and safetensors of `torch_model`, a transformers model in float32, for transformers 4."""
    torch_model.save_pretrained(folder)
    config = config_of_transformers_4(torch_model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def config_of_transformers_4(config: PretrainedConfig) -> dict[str, Any]:
    """Translate a config of transformers 5 for transformers 4, with defaults, since these may differ.

    `rope_parameters` becomes `rope_theta`, `rope_scaling` and `partial_rotary_factor`; if layer types have their own
    (Gemma 3), `rope_local_base_freq` is the theta of the windowed layers. A key has its other names too: Qwen3-MoE's
    `num_local_experts` was `num_experts`.
    """
    keys = config.to_dict()
    translated = {key: value for key, value in keys.items() if key not in DROPPED}
    translated |= {other: keys[name] for other, name in config.attribute_map.items() if name in keys}
    rope = keys.get("rope_parameters") or {}
    if "full_attention" in rope:
        translated["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    return translated | _rope_keys(dict(rope), "type" if config.model_type in NAMES_TYPE else "rope_type")


def _rope_keys(rope: dict[str, Any], type_key: str) -> dict[str, Any]:
    """Translate the parameters of one rotary embedding; `rope_scaling` has its type at `type_key`."""
    keys: dict[str, Any] = {}
    theta, part = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", None)
    if theta is not None:
        keys |= {"rope_theta": theta, "rotary_emb_base": theta}  # the second of each pair is GPT-NeoX's name
    if part is not None:
        keys |= {"partial_rotary_factor": part, "rotary_pct": part}
    kind = rope.pop("rope_type", "default")
    rope.pop("type", None)
    if kind == "longrope":  # transformers 4 has this outside, and computes the factor from it
        rope.pop("factor", None)
        if original := rope.pop("original_max_position_embeddings", None):
            keys["original_max_position_embeddings"] = original
    keys["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    return keys
