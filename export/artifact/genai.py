"""Write genai_config.json, so that onnxruntime-genai runs an artifact's files unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.export.graph.families.table import FAMILIES
from limbeck.export.graph.signature import Signature
from limbeck.export.runtime.session import CONTEXT_KEYS, GRAPH

CONFIG_FILE = "genai_config.json"


def write_genai_config(folder: Path, signature: Signature) -> bool:
    """Write the file into an artifact with a fused graph. Returns False if onnxruntime-genai cannot run the model.

    Args:
        folder: has config.json and maybe generation_config.json.
        signature: inputs and outputs of the graph.
    """
    config = _read(folder / "config.json")
    family = FAMILIES.get(config.get("model_type", ""))
    eos = _setting(folder, config, "eos_token_id")
    if family is None or family.genai_type is None or eos is None:
        return False
    first_eos = eos[0] if isinstance(eos, list) else eos
    context = next(int(config[key]) for key in CONTEXT_KEYS if config.get(key))
    caches = [item["shape"] for item in signature["inputs"] if item["name"].endswith(".key")]
    _, kv_heads, _, head_size = caches[0]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": head_size,
        "hidden_size": config["hidden_size"],
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": len(caches),
        "num_key_value_heads": kv_heads,
    }
    model = {
        "type": family.genai_type,
        "bos_token_id": _first(_setting(folder, config, "bos_token_id"), first_eos),
        "eos_token_id": eos,
        "pad_token_id": _first(_setting(folder, config, "pad_token_id"), first_eos),
        "context_length": context,
        "vocab_size": signature["outputs"][0]["shape"][-1],
        "decoder": decoder,
    }
    # Defaults that a program can override: greedy, and new keys and values written into the same buffer.
    search = {"do_sample": False, "num_beams": 1, "max_length": context, "past_present_share_buffer": True}
    (folder / CONFIG_FILE).write_text(json.dumps({"model": model, "search": search}, indent=1) + "\n")
    return True


def _setting(folder: Path, config: dict[str, Any], name: str) -> Any:
    """Return a setting of generation_config.json, else of `config`, else None."""
    generation = folder / "generation_config.json"
    found = _read(generation).get(name) if generation.is_file() else None
    return config.get(name) if found is None else found


def _first(value: Any, default: int) -> int:
    """Return a token id, or the first of a list of them, or `default` for None."""
    if value is None:
        return default
    return value[0] if isinstance(value, list) else value


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())
