"""Give the weights of a Llama to llama.cpp, for benchmarks that have it as a peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.registry.core.terminal import print_status

LLAMA_FTYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}


def quantize_by_llama_cpp(model: Path, folder: Path, formats: Sequence[str]) -> dict[str, Path]:
    """Write a GGUF file in each format to `folder`. Returns format -> file; {} if llama-cpp-python is missing."""
    try:
        import llama_cpp
    except ImportError:
        print_status("llama-cpp-python is not installed (extra `bench`): skipped")
        return {}
    files = {name: folder / f"{name}.gguf" for name in ("F32", *formats)}
    write_llama_gguf(model, files["F32"])
    for name in formats:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = LLAMA_FTYPES[name]
        paths = (str(files[which]).encode() for which in ("F32", name))
        if name != "F32" and llama_cpp.llama_model_quantize(*paths, params):
            raise RuntimeError(f"llama.cpp could not quantize to {name}")
    return {name: files[name] for name in formats}


def write_llama_gguf(model: Path, path: Path) -> None:
    """Write the checkpoint of a Llama as GGUF in float32, without its tokenizer."""
    import gguf

    from limbeck.registry.checkpoints.load import load_model

    loaded: Any = load_model(model)
    config = loaded.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in loaded.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        count = heads.get(name.split(".")[-2])
        if count:  # llama.cpp rotates neighbours, transformers halves
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
