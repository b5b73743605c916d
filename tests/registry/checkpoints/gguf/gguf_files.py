"""Writes small GGUF files, as llama.cpp's converter does: of a model and of a tokenizer's parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import quantize
from transformers import PreTrainedModel

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def write_model(
    file: Path,
    model: PreTrainedModel,
    architecture: str,
    keys: Mapping[str, Any],
    tokens: Mapping[str, Any],
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    quantized: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Write a GGUF file of a model.

    Args:
        architecture: llama.cpp's name.
        keys: metadata, without the prefix of the architecture.
        tokens: metadata of the tokenizer, without the prefix tokenizer.ggml.
        tensors: further tensors.
        quantized: type of the matrices; None for float32.
    """
    writer = gguf.GGUFWriter(file, architecture)
    write_keys(writer, {f"{architecture}.{key}": value for key, value in keys.items()})
    write_keys(writer, {f"tokenizer.ggml.{key}": value for key, value in tokens.items()})
    for name, tensor in stored_tensors(model, architecture):
        values = tensor.contiguous().numpy()
        if quantized is not None and values.ndim == 2:
            writer.add_tensor(name, quantize(values, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, values)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    write_all(writer)
    return file


def write_tokenizer(file: Path, architecture: str = "llama", **tokens: Any) -> Path:
    """Write a GGUF file with the metadata of a tokenizer and no tensors."""
    writer = gguf.GGUFWriter(file, architecture)
    write_keys(writer, {f"tokenizer.ggml.{key}": value for key, value in tokens.items()})
    write_all(writer)
    return file


def tokens_of_folder(folder: Path) -> dict[str, Any]:
    """The metadata of the tests' tokenizer, whose first token is special, from its tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": vocabulary,
        "token_type": [CONTROL, *[NORMAL] * (len(vocabulary) - 1)],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "eos_token_id": 0,
        "padding_token_id": 0,
        "add_bos_token": False,
    }


def write_keys(writer: gguf.GGUFWriter, keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def write_all(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model, under the names and with the values that llama.cpp stores."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        block = "blk." + "".join(name.split(".")[2:3])
        if name.endswith(".experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            yield from ((f"{block}.ffn_gate_exps.weight", gate), (f"{block}.ffn_up_exps.weight", up))
        elif name.endswith(".experts.down_proj"):
            yield f"{block}.ffn_down_exps.weight", tensor
        elif name.endswith(".dt_bias"):
            yield f"{block}.ssm_dt.bias", tensor
        elif name.endswith(".A_log"):
            yield f"{block}.ssm_a", -tensor.exp()
        else:
            stem, _, ending = name.rpartition(".")
            yield f"{names.get_name(stem)}.{ending}", as_stored(model, architecture, name, tensor)


def as_stored(model: PreTrainedModel, architecture: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as llama.cpp stores it: it has other layouts of some, and norms that no 1 is added to."""
    config = model.config
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):  # rotary pairs side by side
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    if name.endswith("norm.weight") and (architecture.startswith("gemma") or architecture == "qwen35"):
        return tensor if "linear_attn" in name else tensor + 1
    if architecture == "gpt2" and ".c_" in name and tensor.ndim == 2:
        return tensor.T
    return tensor.squeeze(1) if ".conv" in name else tensor


def sizes(model: PreTrainedModel) -> dict[str, Any]:
    """The metadata keys of sizes that the model's config has."""
    names = {
        "context_length": "max_position_embeddings",
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    }
    return {key: getattr(model.config, name) for key, name in names.items() if hasattr(model.config, name)}
