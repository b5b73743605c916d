"""Floating point operations of one token, from a model's configuration.

A multiplication and an addition are two operations. One token that attends to n tokens, itself included, takes

    2 * W + 4 * L * H * D * n

W: entries of all weight matrices but those of embeddings that are looked up; the head counts, tied or not, and of
the experts only the share that a token is sent to. L layers, H attention heads of D numbers: half of the second
term is queries times keys, half is weights times values. Norms, activations and softmax are left out, a few
percent at most. Full attention is assumed, no sliding window. The figure is the same whatever the precision.
"""

from __future__ import annotations

from pathlib import Path


def flops_per_token(folder: Path, attended_tokens: float, trust_remote_code: bool = False) -> float | None:
    """Operations of one token that attends to `attended_tokens` tokens; None where transformers cannot build the model.

    Linear in `attended_tokens`: over a request of n tokens with a cache the mean is that of (n + 1) / 2.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # whatever a model's own code raises; the figure is one of many
        return None
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    weights = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        share = chosen / experts if chosen and experts and ".experts" in name else 1.0
        weights += share * sum(w.numel() for w in module.parameters(recurse=False) if w.ndim > 1)
    heads = getattr(text, "num_attention_heads", 0)
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return 2 * weights + 4 * text.num_hidden_layers * heads * size * attended_tokens
