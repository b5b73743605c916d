"""Counts the floating-point operations (FLOPs) of one token from a model's configuration.

A multiplication and an addition are two operations. One token that attends to n tokens, itself included, takes

    2 * W + 4 * L * H * D * n

W is the number of entries of all weight matrices except embeddings that are only looked up: the head counts, tied or
not. Of a mixture of experts only the share that a token is routed to counts. The second term is attention in L layers
with H heads of width D: half of it is queries times keys, half is weights times values. Norms, activations and softmax
are left out, a few percent at most. Attention is assumed to be full, without a sliding window. Precision does not
change the figure.
"""

from __future__ import annotations

from pathlib import Path


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
    active = getattr(text, "num_experts_per_tok", None)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    weights = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        share = active / experts if active and experts and ".experts" in name else 1.0
        weights += share * sum(w.numel() for w in module.parameters(recurse=False) if w.ndim > 1)
    heads = getattr(text, "num_attention_heads", 0)
    head_width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return 2 * weights + 4 * text.num_hidden_layers * heads * head_width * attended_tokens
