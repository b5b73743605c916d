"""From a loaded transformers model to the description that `limbeck.export.graph.decoder` writes, family by family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from limbeck.export.graph.decoder import MLP, Attention, Decoder, Layer, Linear, Norm, Rotary

# Rotary embeddings whose tables depend on how long the text is; a graph holds one table.
DYNAMIC_ROTARY = {"dynamic", "longrope"}
# transformers' names of activations -> those of limbeck.export.graph.decoder.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


class UnsupportedModel(Exception):
    """The model has a part that the fused graph has no place for."""


def decoder_from_model(model: Any) -> Decoder:
    """The description of `model`, a transformers causal language model in float32.

    Raises Unwritable for a family that is not in `FAMILIES`, or a member of one with a part of its own.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise UnsupportedModel(f"no description of the architecture {model.config.model_type!r}")
    reader = _Reader(model)
    decoder = family(reader, model)
    unread = sorted(reader.unread_parameters())
    if unread:
        raise UnsupportedModel(f"no place for {unread[0]}")
    return decoder


class _Reader:
    """Reads parameters by module, and knows which it has read: one that is left has been overlooked."""

    def __init__(self, model: Any) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._read: set[int] = set()

    def unread_parameters(self) -> set[str]:
        """Names of the parameters that nobody has asked for."""
        return {name for key, name in self._parameters.items() if key not in self._read}

    def name(self, module: Any) -> str:
        return self._names[module]

    def array(self, parameter: Any) -> np.ndarray:
        self._read.add(id(parameter))
        return parameter.detach().numpy()

    def linear(self, module: Any, scale: float = 1.0) -> Linear:
        """A torch Linear, or GPT-2's Conv1D, whose weight lies the other way."""
        weight = self.array(module.weight)
        weight = weight if type(module).__name__ == "Conv1D" else weight.T
        bias = None if module.bias is None else self.array(module.bias)
        if scale != 1:
            weight, bias = weight * np.float32(scale), None if bias is None else bias * np.float32(scale)
        return Linear(self.name(module), weight, bias)

    def concatenate_linears(self, name: str, *modules: Any) -> Linear:
        """Several products of the same input as one."""
        parts = [self.linear(module) for module in modules]
        biases = [np.zeros(p.weight.shape[1], np.float32) if p.bias is None else p.bias for p in parts]
        bias = None if all(p.bias is None for p in parts) else np.concatenate(biases)
        return Linear(name, np.concatenate([p.weight for p in parts], axis=1), bias)

    def rms_norm(self, module: Any, weight_offset: float = 0.0) -> Norm:
        eps = getattr(module, "variance_epsilon", None) or module.eps
        weight = self.array(module.weight)
        return Norm(
            self.name(module), weight + np.float32(weight_offset) if weight_offset else weight, None, float(eps)
        )

    def layer_norm(self, module: Any) -> Norm:
        size = module.normalized_shape[0]
        weight = np.ones(size, np.float32) if module.weight is None else self.array(module.weight)
        bias = np.zeros(size, np.float32) if module.bias is None else self.array(module.bias)
        return Norm(self.name(module), weight, bias, float(module.eps))

    def norm(self, module: Any, weight_offset: float = 0.0) -> Norm:
        return self.layer_norm(module) if hasattr(module, "normalized_shape") else self.rms_norm(module, weight_offset)

    def rotary(self, module: Any, positions: int) -> Rotary:
        """The tables of a transformers rotary module, whatever scaling it applies."""
        import torch

        if module.rope_type in DYNAMIC_ROTARY:
            raise UnsupportedModel(f"rotary embedding of type {module.rope_type!r}")
        with torch.inference_mode():
            cos, sin = module(torch.zeros(1), torch.arange(positions)[None])
        half = cos.shape[-1] // 2  # the second half repeats the first
        return Rotary(self.name(module), cos[0, :, :half].numpy(), sin[0, :, :half].numpy())

    def head(self, model: Any, embedding: Any) -> tuple[Linear | None, np.ndarray | None]:
        """The language-model head, None where it is the embedding; and its bias where it is tied."""
        head = model.get_output_embeddings()
        if head.weight is not embedding.weight:
            return self.linear(head), None
        return None, None if head.bias is None else self.array(head.bias)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {name!r}")
    return ACTIVATIONS[name]


def _llama(reader: _Reader, model: Any) -> Decoder:
    """Llama and its kin: Qwen2 and 3, Mistral, Gemma 1 to 3, Phi-3, SmolLM3, Granite, OLMo 2, StableLM."""
    config, body = model.config, model.model
    gemma = config.model_type.startswith("gemma")
    plus = 1.0 if gemma else 0.0
    residual = getattr(config, "residual_multiplier", 1.0)
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "clip_qkv", None):
        raise UnsupportedModel("attention that is not causal, or clipped")
    everywhere = reader.rotary(body.rotary_emb, config.max_position_embeddings)
    local = getattr(body, "rotary_emb_local", None)
    windowed = reader.rotary(local, config.max_position_embeddings) if local is not None else everywhere
    layers = []
    for layer in body.layers:
        name, attn, mlp = reader.name(layer), layer.self_attn, layer.mlp
        window = _window(config, attn)
        rotates = getattr(attn, "use_rope", True)
        qk_norms = [reader.norm(getattr(attn, n), plus) if hasattr(attn, n) else None for n in ("q_norm", "k_norm")]
        attention = Attention(
            qkv=reader.linear(attn.qkv_proj)
            if hasattr(attn, "qkv_proj")
            else reader.concatenate_linears(f"{name}.self_attn.qkv_proj", attn.q_proj, attn.k_proj, attn.v_proj),
            output=reader.linear(attn.o_proj, residual),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=attn.head_dim,
            scale=float(getattr(attn, "scaling", attn.head_dim**-0.5)),
            rotary=(windowed if window > 0 else everywhere) if rotates else None,
            window=window,
            softcap=float(getattr(attn, "attn_logit_softcapping", None) or 0.0),
            q_norm=qk_norms[0],
            k_norm=qk_norms[1],
        )
        norms = _norms(reader, layer, plus)
        parallel = getattr(config, "use_parallel_residual", False)  # StableLM: both parts read the same norm
        if parallel:
            norms["before_mlp"] = norms["before_attention"]
        layers.append(Layer(name, attention, _gated_mlp(reader, mlp, config, residual), **norms, parallel=parallel))
    embedding = body.embed_tokens
    head, head_bias = reader.head(model, embedding)
    return Decoder(
        reader.name(embedding),
        reader.array(embedding.weight),
        layers,
        reader.norm(body.norm, plus),
        head,
        embedding_scale=_embedding_scale(config, gemma),
        head_bias=head_bias,
        logit_scale=1 / getattr(config, "logits_scaling", 1.0),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def _embedding_scale(config: Any, gemma: bool) -> float:
    return math.sqrt(config.hidden_size) if gemma else getattr(config, "embedding_multiplier", 1.0)


def _window(config: Any, attn: Any) -> int:
    """How many positions a layer sees; -1 is all."""
    window = getattr(attn, "sliding_window", None)
    if config.model_type in ("mistral", "phi3"):  # every layer alike, and the attention does not say
        window = getattr(config, "sliding_window", None)
    return -1 if window is None else int(window)


def _gated_mlp(reader: _Reader, mlp: Any, config: Any, scale: float) -> MLP:
    """An MLP with a gate; Phi-3 keeps the gate and what it gates in one matrix."""
    activation = _activation(getattr(config, "hidden_activation", None) or config.hidden_act)
    down = reader.linear(mlp.down_proj, scale)
    if not hasattr(mlp, "gate_up_proj"):
        return MLP(reader.linear(mlp.up_proj), down, activation, reader.linear(mlp.gate_proj))
    both = reader.linear(mlp.gate_up_proj)
    gate, up = np.split(both.weight, 2, axis=1)
    name = both.name.removesuffix("gate_up_proj")
    return MLP(Linear(f"{name}up_proj", up), down, activation, Linear(f"{name}gate_proj", gate))


def _norms(reader: _Reader, layer: Any, weight_offset: float) -> dict[str, Norm | None]:
    """A layer's norms by their place. Gemma 2 and OLMo 2 have one after each part, and OLMo 2 none before."""

    def norm(name: str) -> Norm | None:
        module = getattr(layer, name, None)
        return None if module is None else reader.norm(module, weight_offset)

    if hasattr(layer, "post_feedforward_layernorm"):
        return {
            "before_attention": norm("input_layernorm"),
            "after_attention": norm("post_attention_layernorm"),
            "before_mlp": norm("pre_feedforward_layernorm"),
            "after_mlp": norm("post_feedforward_layernorm"),
        }
    return {"before_attention": norm("input_layernorm"), "before_mlp": norm("post_attention_layernorm")}


def _gpt2(reader: _Reader, model: Any) -> Decoder:
    config, body = model.config, model.transformer
    size = config.n_embd // config.n_head
    layers = []
    for index, layer in enumerate(body.h):
        scale = size**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        attn, mlp = layer.attn, layer.mlp
        heads = config.n_head
        attention = Attention(reader.linear(attn.c_attn), reader.linear(attn.c_proj), heads, heads, size, scale)
        activation = _activation(config.activation_function)
        plain = MLP(reader.linear(mlp.c_fc), reader.linear(mlp.c_proj), activation)
        layers.append(
            Layer(reader.name(layer), attention, plain, reader.layer_norm(layer.ln_1), reader.layer_norm(layer.ln_2))
        )
    return _with_head(reader, model, body.wte, layers, body.ln_f, positions=reader.array(body.wpe.weight))


def _opt(reader: _Reader, model: Any) -> Decoder:
    config, body = model.config, model.model.decoder
    if not config.do_layer_norm_before or body.final_layer_norm is None:
        raise UnsupportedModel("norms after each part only")
    layers = []
    for layer in body.layers:
        name, attn = reader.name(layer), layer.self_attn
        qkv = reader.concatenate_linears(f"{name}.self_attn.qkv_proj", attn.q_proj, attn.k_proj, attn.v_proj)
        heads = attn.num_heads
        attention = Attention(qkv, reader.linear(attn.out_proj), heads, heads, attn.head_dim, float(attn.scaling))
        activation = _activation(config.activation_function)
        plain = MLP(reader.linear(layer.fc1), reader.linear(layer.fc2), activation)
        norms = (reader.layer_norm(layer.self_attn_layer_norm), reader.layer_norm(layer.final_layer_norm))
        layers.append(Layer(name, attention, plain, *norms))
    places = body.embed_positions
    positions = reader.array(places.weight)
    return _with_head(
        reader, model, body.embed_tokens, layers, body.final_layer_norm,
        positions=positions, first_position=places.offset,
    )  # fmt: skip


def _gpt_neox(reader: _Reader, model: Any) -> Decoder:
    config, body = model.config, model.gpt_neox
    heads = config.num_attention_heads
    rotary = reader.rotary(body.rotary_emb, config.max_position_embeddings)
    layers = []
    for layer in body.layers:
        attn, mlp = layer.attention, layer.mlp
        size = attn.head_size
        attention = Attention(
            _reorder_qkv(reader.linear(attn.query_key_value), heads, size),
            reader.linear(attn.dense),
            heads,
            heads,
            size,
            float(attn.scaling),
            rotary,
        )
        activation = _activation(config.hidden_act)
        plain = MLP(reader.linear(mlp.dense_h_to_4h), reader.linear(mlp.dense_4h_to_h), activation)
        norms = (reader.layer_norm(layer.input_layernorm), reader.layer_norm(layer.post_attention_layernorm))
        layers.append(Layer(reader.name(layer), attention, plain, *norms, parallel=config.use_parallel_residual))
    return _with_head(reader, model, body.embed_in, layers, body.final_layer_norm)


def _reorder_qkv(linear: Linear, heads: int, size: int) -> Linear:
    """GPT-NeoX's columns are query, key and value of one head after another; here all queries come first."""
    order = np.arange(3 * heads * size).reshape(heads, 3, size).transpose(1, 0, 2).ravel()
    return Linear(linear.name, linear.weight[:, order], None if linear.bias is None else linear.bias[order])


def _phi(reader: _Reader, model: Any) -> Decoder:
    config, body = model.config, model.model
    rotary = reader.rotary(body.rotary_emb, config.max_position_embeddings)
    layers = []
    for layer in body.layers:
        name, attn, mlp = reader.name(layer), layer.self_attn, layer.mlp
        attention = Attention(
            reader.concatenate_linears(f"{name}.self_attn.qkv_proj", attn.q_proj, attn.k_proj, attn.v_proj),
            reader.linear(attn.dense),
            config.num_attention_heads,
            config.num_key_value_heads,
            attn.head_dim,
            float(attn.scaling),
            rotary,
        )
        plain = MLP(reader.linear(mlp.fc1), reader.linear(mlp.fc2), _activation(config.hidden_act))
        norm = reader.layer_norm(layer.input_layernorm)
        layers.append(Layer(name, attention, plain, norm, norm, parallel=True))
    return _with_head(reader, model, body.embed_tokens, layers, body.final_layernorm)


def _with_head(
    reader: _Reader, model: Any, embedding: Any, layers: list[Layer], norm: Any, **positions: Any
) -> Decoder:
    """The whole decoder, from its layers and what is before and after them."""
    head, head_bias = reader.head(model, embedding)
    table = reader.array(embedding.weight)
    return Decoder(reader.name(embedding), table, layers, reader.norm(norm), head, head_bias=head_bias, **positions)


# model_type -> what describes it.
FAMILIES: dict[str, Callable[[_Reader, Any], Decoder]] = {
    "gemma": _llama,
    "gemma2": _llama,
    "gemma3_text": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "granite": _llama,
    "llama": _llama,
    "mistral": _llama,
    "olmo2": _llama,
    "opt": _opt,
    "phi": _phi,
    "phi3": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "smollm3": _llama,
    "stablelm": _llama,
}
