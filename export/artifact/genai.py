"""genai_config.json: what onnxruntime-genai wants to know of an artifact, so that it runs the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.export.graph.signature import Tensors
from limbeck.export.runtime.session import CONTEXT_KEYS

CONFIG_FILE = "genai_config.json"
# model_type of transformers -> `type` of onnxruntime-genai. It has no others of those that have a fused graph.
GENAI_MODEL_TYPES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "olmo2": "olmo",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}


def write_genai_config(folder: Path, tensors: Tensors) -> bool:
    """Write the file into an artifact whose graph is a fused one; False where onnxruntime-genai has no such model.

    Args:
        folder: with config.json, and generation_config.json where there is one.
        tensors: the graph's, from `limbeck.export.graph.signature`.
    """
    config = _read(folder / "config.json")
    model_type = GENAI_MODEL_TYPES.get(config.get("model_type", ""))
    eos = _setting(folder, config, "eos_token_id")
    if model_type is None or eos is None:
        return False
    first_eos = eos[0] if isinstance(eos, list) else eos
    context = next(int(config[key]) for key in CONTEXT_KEYS if config.get(key))
    caches = [item["shape"] for item in tensors["inputs"] if item["name"].endswith(".key")]
    _, kv_heads, _, head_size = caches[0]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
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
        "type": model_type,
        "bos_token_id": _first(_setting(folder, config, "bos_token_id"), first_eos),
        "eos_token_id": eos,
        "pad_token_id": _first(_setting(folder, config, "pad_token_id"), first_eos),
        "context_length": context,
        "vocab_size": tensors["outputs"][0]["shape"][-1],
        "decoder": decoder,
    }
    # Greedy, with the new keys written where the old ones lie, unless a program asks for something else.
    search = {"do_sample": False, "num_beams": 1, "max_length": context, "past_present_share_buffer": True}
    (folder / CONFIG_FILE).write_text(json.dumps({"model": model, "search": search}, indent=1) + "\n")
    return True


def _setting(folder: Path, config: dict[str, Any], name: str) -> Any:
    generation = folder / "generation_config.json"
    found = _read(generation).get(name) if generation.is_file() else None
    return config.get(name) if found is None else found


def _first(value: Any, otherwise: int) -> int:
    return otherwise if value is None else value[0] if isinstance(value, list) else value


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())
