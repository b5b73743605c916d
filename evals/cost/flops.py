"""Counts the floating-point operations (FLOPs) of one token from a model's configuration.

A multiplication and an addition are two operations. One token that attends to n tokens, itself included, takes

    2 * W + 4 * L * H * D * n

W is the number of entries of all weight matrices except embeddings that are only looked up: the head counts, tied or
not. Of a mixture of experts only the share that a token is routed to counts. The second term is attention in L layers
with H heads of width D: half of it is queries times keys, half is weights times values. Norms, activations and softmax
are left out, a few percent at most. Attention is assumed to be full, without a sliding window. Layers with a recurrent
state in place of attention (gated delta rule, short convolution) count by their weights alone. Precision does not
change the figure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def flops_per_token(folder: Path, attended_tokens: float, trust_remote_code: bool = False) -> float | None:
    """FLOPs of one token that attends to `attended_tokens` tokens; None if transformers cannot build the model.

    The figure is linear in `attended_tokens`: its mean over a request of n tokens with a key-value cache is the value
    for (n + 1) / 2.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # a model's own code may raise any type, and a cost without FLOPs is still useful
        return None
    text = config.get_text_config()
    weights = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for parameter, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1 and "bias" not in parameter:
                weights += weight.numel() * (_active_share(text, weight) if ".experts" in name else 1.0)
    return 2 * weights + 4 * _attention_width(text) * attended_tokens


def _active_share(config: Any, weight: Any) -> float:
    """The share of the experts that a token is routed to. The experts' weights are one tensor, or each has its own."""
    active = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if weight.ndim == 3:
        experts = len(weight)
    return active / experts if active and experts else 1.0


def _attention_width(config: Any) -> int:
    """The widths of all heads of all attention layers together."""
    heads = getattr(config, "num_attention_heads", 0)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    total = 0
    for layer, layer_type in enumerate(types):
        if layer_type.endswith("attention") and layer_type != "linear_attention":
            # Gemma 4: the size of a head depends on the layer.
            size = getattr(config.per_layer_config[layer], "head_dim", None)
            total += heads * (size or (config.hidden_size // heads if heads else 0))
    return total
