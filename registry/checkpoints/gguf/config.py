"""The config of a GGUF file, from its metadata.

transformers reads a part of the metadata only, and silently: it drops Llama 3's rotary scaling, yarn, windows, soft
caps, biases and head sizes. So each architecture states here what it reads, and a key that nobody read is refused.
llama.cpp defines what the keys mean (src/models/*.cpp, conversion/*.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from limbeck.registry.checkpoints.gguf.file import GgufFile
from limbeck.registry.checkpoints.gguf.rotary import rope_parameters
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Config = dict[str, Any]
NO_EFFECT = {"vocab_size", "tensor_data_layout", "use_parallel_residual", "attention.causal"}
# llama.cpp knows no scale of the query but by the number of layers: these are the 27B models.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def config_of_gguf(file: GgufFile) -> PretrainedConfig:
    """The config of the model in a GGUF file.

    Raises BadInput for an architecture that is not supported, and for metadata that Limbeck cannot carry over.
    """
    from transformers import AutoConfig

    architecture = file.architecture
    if architecture not in ARCHITECTURES:
        raise BadInput(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; "
            f"supported are {', '.join(sorted(ARCHITECTURES))}",
            fix="give the original checkpoint, with config.json and safetensors",
        )
    fields = ARCHITECTURES[architecture](file)
    _refuse_unread(file)
    fields |= {
        "vocab_size": file.shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in file.shapes,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    try:
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # strict config classes raise errors of any type
        raise BadInput(f"{file.path}: its metadata is not that of a {architecture} model: {error}") from error


def _refuse_unread(file: GgufFile) -> None:
    """Raise BadInput for keys that may change the numbers and that nobody read. Zero and false change nothing."""
    prefix = file.architecture + "."
    if file.metadata.get(f"{prefix}attention.causal", True) is False:
        raise BadInput(f"{file.path} is an encoder: its attention is not causal")
    unread = {
        key: value
        for key, value in file.metadata.unread(prefix).items()
        if value not in (0, False, "none", "") and key.removeprefix(prefix) not in NO_EFFECT
    }
    if unread:
        listed = ", ".join(f"{key} = {value!r}" for key, value in sorted(unread.items())[:5])
        raise BadInput(
            f"{file.path}: Limbeck cannot carry over {listed}",
            fix="give the original checkpoint, with config.json and safetensors",
        )


def _read(file: GgufFile, names: dict[str, str]) -> Config:
    """The values of keys, under the names of the config. Raises BadInput for a missing key."""
    found = {}
    for key, name in names.items():
        try:
            found[name] = file.metadata[f"{file.architecture}.{key}"]
        except KeyError:
            raise BadInput(f"{file.path}: its metadata lacks {file.architecture}.{key}") from None
        if isinstance(found[name], list):  # one value per layer
            raise BadInput(f"{file.path}: {file.architecture}.{key} differs from layer to layer")
    return found


def _sizes(file: GgufFile, epsilon: str = "rms_norm_eps") -> Config:
    """Sizes that all decoders with rotary embeddings state."""
    kind = "layer_norm_epsilon" if f"{file.architecture}.attention.layer_norm_epsilon" in file.metadata else None
    found = _read(
        file,
        {
            "context_length": "max_position_embeddings",
            "block_count": "num_hidden_layers",
            "embedding_length": "hidden_size",
            "attention.head_count": "num_attention_heads",
            f"attention.{kind or 'layer_norm_rms_epsilon'}": epsilon,
        },
    )
    prefix = file.architecture
    found["num_key_value_heads"] = file.metadata.get(f"{prefix}.attention.head_count_kv", found["num_attention_heads"])
    # A mixture of experts may have no dense layer.
    found["intermediate_size"] = file.metadata.get(f"{prefix}.feed_forward_length", 0)
    return found


def _head_dim(file: GgufFile, sizes: Config) -> int:
    """The head size. Raises BadInput if keys and values differ in it."""
    prefix = f"{file.architecture}.attention"
    default = sizes["hidden_size"] // sizes["num_attention_heads"]
    key, value = (int(file.metadata.get(f"{prefix}.{name}_length", default)) for name in ("key", "value"))
    if key != value:
        raise BadInput(f"{file.path}: heads of {key} for keys and of {value} for values are not supported")
    return key


def _decoder(file: GgufFile, model_type: str, epsilon: str = "rms_norm_eps", states_head_dim: bool = True) -> Config:
    """Sizes, head size and rotary embedding."""
    sizes = _sizes(file, epsilon)
    head_dim = _head_dim(file, sizes)
    if states_head_dim:
        sizes["head_dim"] = head_dim
    elif head_dim * sizes["num_attention_heads"] != sizes["hidden_size"]:
        raise BadInput(f"{file.path}: {file.architecture} has heads of hidden size / number of heads, not {head_dim}")
    return {"model_type": model_type, **sizes, "rope_parameters": rope_parameters(file, head_dim)}


def _llama(file: GgufFile) -> Config:
    if file.metadata.get("llama.expert_count", 0):
        raise BadInput(f"{file.path}: a Mixtral in a GGUF file is not supported", fix="give the original checkpoint")
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_down.bias"}
    return _decoder(file, "llama") | {name: tensor in file.shapes for name, tensor in biases.items()}


def _qwen2(file: GgufFile) -> Config:
    return _decoder(file, "qwen2", states_head_dim=False)


def _qwen3(file: GgufFile) -> Config:
    return _decoder(file, "qwen3")


def _experts(file: GgufFile) -> Config:
    names = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
    return _read(file, names | {"expert_feed_forward_length": "moe_intermediate_size"})


def _qwen3moe(file: GgufFile) -> Config:
    return _decoder(file, "qwen3_moe") | _experts(file) | {"norm_topk_prob": True}


def _phi3(file: GgufFile) -> Config:
    window = file.metadata.get("phi3.attention.sliding_window") or None
    found = _decoder(file, "phi3", states_head_dim=False) | {"sliding_window": window}
    original = file.metadata.get("phi3.rope.scaling.original_context_length")
    return found | ({"original_max_position_embeddings": original} if original else {})


def _gemma(file: GgufFile, model_type: str) -> Config:
    """What Gemma 2 and 3 share: windows in most layers, soft caps, and a scale of the query."""
    found = _decoder(file, model_type)
    is_27b = found["num_hidden_layers"] == GEMMA_27B_LAYERS[file.architecture]
    size = found["hidden_size"] // found["num_attention_heads"] if is_27b else found["head_dim"]
    prefix = file.architecture
    return found | {
        "query_pre_attn_scalar": size,
        "final_logit_softcapping": file.metadata.get(f"{prefix}.final_logit_softcapping"),
        "attn_logit_softcapping": file.metadata.get(f"{prefix}.attn_logit_softcapping"),
        "sliding_window": file.metadata.get(f"{prefix}.attention.sliding_window", 4096),
    }


def _gemma2(file: GgufFile) -> Config:
    return _gemma(file, "gemma2")


def _gemma3(file: GgufFile) -> Config:
    found = _gemma(file, "gemma3_text")
    pattern = int(file.metadata.get("gemma3.attention.sliding_window_pattern", 6))
    local_theta = file.metadata.get("gemma3.rope.freq_base_swa", 10000.0)
    layers = range(1, found["num_hidden_layers"] + 1)
    return found | {
        "layer_types": ["sliding_attention" if layer % pattern else "full_attention" for layer in layers],
        "rope_parameters": {
            "full_attention": found["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
    }


def _starcoder2(file: GgufFile) -> Config:
    found = _decoder(file, "starcoder2", epsilon="norm_epsilon", states_head_dim=False)
    return found | {"use_bias": "blk.0.attn_q.bias" in file.shapes, "sliding_window": None}


def _stablelm(file: GgufFile) -> Config:
    found = _decoder(file, "stablelm", epsilon="layer_norm_eps", states_head_dim=False)
    return found | {
        "use_qkv_bias": "blk.0.attn_q.bias" in file.shapes,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.shapes,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in file.shapes,
    }


def _gpt2(file: GgufFile) -> Config:
    names = {
        "context_length": "n_positions",
        "block_count": "n_layer",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    }
    return {"model_type": "gpt2"} | _read(file, names)


def _own_reader(file: GgufFile) -> Config:
    """The config of an architecture for which transformers reads all metadata."""
    from transformers.integrations.gguf import get_gguf_config

    metadata: Any = _CountedVocabulary(file.metadata)
    try:
        return dict(get_gguf_config(metadata, tuple(file.shapes)))
    except KeyError as error:
        raise BadInput(f"{file.path}: its metadata lacks {error}") from error


def _qwen35(file: GgufFile) -> Config:
    found = _own_reader(file)
    _head_dim(file, found)
    interval = found["full_attention_interval"]
    recurrent = [bool((layer + 1) % interval) for layer in range(found["num_hidden_layers"])]
    if file.metadata.get("qwen35.attention.recurrent_layers", recurrent)[: len(recurrent)] != recurrent:
        raise BadInput(f"{file.path}: not every {interval}th layer has full attention")
    return found


class _CountedVocabulary(Mapping[str, Any]):
    """Metadata as transformers' readers take it: with the number of tokens in place of the tokens."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def __getitem__(self, key: str) -> Any:
        value = self._metadata[key]
        return len(value) if key == "tokenizer.ggml.tokens" else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._metadata)

    def __len__(self) -> int:
        return len(self._metadata)


ARCHITECTURES: dict[str, Callable[[GgufFile], Config]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "lfm2": _own_reader,
    "llama": _llama,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen35": _qwen35,
    "qwen3moe": _qwen3moe,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
