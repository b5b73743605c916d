"""The mixtures of experts: families whose layers are those of Llama, with experts in place of the MLP."""

from __future__ import annotations

from typing import Any

import numpy as np

from limbeck.export.graph.decoder import MLP, Experts, Linear, Router
from limbeck.export.graph.families.llama import gated_mlp
from limbeck.export.graph.families.parts import first_part
from limbeck.export.graph.reader import ModelReader, UnsupportedModel

# ERNIE 4.5 divides the weights by their sum, but at least by this: the graph divides by the sum.
MAX_NORM_MIN = 1e-6


def read_experts(
    reader: ModelReader, layer: Any, config: Any, scale: float = 1.0, *, sigmoid: bool = False
) -> MLP | Experts:
    """Read the experts of a layer, or its MLP if it has none: in some families, only some layers have experts.

    Args:
        scale: multiplies the output.
        sigmoid: the router's scores are the sigmoid of its logits, not the softmax.
    """
    block = first_part(layer, "mlp", "block_sparse_moe", "feed_forward")
    if not hasattr(block, "experts"):
        return gated_mlp(reader, block, config, scale)
    if not _is_silu(block.experts.act_fn):
        raise UnsupportedModel("experts with an activation that is not silu: onnxruntime's CPU has no other")
    module, name = block.experts, f"{reader.name(block)}.experts"
    router, factor = _read_router(reader, block, sigmoid)
    gate, up = np.split(reader.array(module.gate_up_proj), 2, axis=1)
    # The MLP that every token runs is in the block of experts, or beside it in the layer.
    shared = first_part(block, "shared_expert", "shared_experts", "shared_mlp") or first_part(layer, "shared_mlp")
    factor *= scale
    down = reader.array(module.down_proj)
    return Experts(
        name,
        router,
        np.stack([gate, up], axis=2).reshape(len(gate), -1, gate.shape[2]),
        down if factor == 1 else down * np.float32(factor),
        shared=None if shared is None else gated_mlp(reader, shared, config, scale),
        shared_gate=reader.linear(block.shared_expert_gate) if hasattr(block, "shared_expert_gate") else None,
    )


def _is_silu(activation: Any) -> bool:
    import torch

    x = torch.linspace(-4, 4, 9)
    return torch.allclose(activation(x), torch.nn.functional.silu(x))


def _read_router(reader: ModelReader, block: Any, sigmoid: bool) -> tuple[Router, float]:
    """Return the router, and the factor of its weights."""
    module = block.gate if hasattr(block, "gate") else block.router
    if getattr(module, "num_group", 1) > 1:
        raise UnsupportedModel("experts that are chosen in groups")
    if getattr(module, "norm_min", 0) > MAX_NORM_MIN:
        raise UnsupportedModel(f"moe_norm_min={module.norm_min}")
    weights = getattr(module, "wg", module)
    owners = (getattr(module, "moe_statics", module), block)
    biases = [first_part(owner, "e_score_correction_bias", "expert_bias") for owner in owners]
    bias = next((part for part in biases if part is not None), None)
    router = Router(
        Linear(reader.name(module), reader.array(weights.weight).T),
        module.top_k,
        normalize=getattr(module, "norm_topk_prob", True),
        sigmoid=sigmoid,
        bias=None if bias is None else reader.array(bias).ravel(),
    )
    return router, getattr(module, "routed_scaling_factor", 1.0)


def read_clamped_experts(reader: ModelReader, layer: Any, config: Any, scale: float) -> Experts:
    """Read gpt-oss's experts: with biases and limits, and with weights that are transposed, gate and up alternating."""
    module, router = layer.mlp.experts, layer.mlp.router
    return Experts(
        reader.name(module),
        Router(reader.linear(router), router.top_k, normalize=True),
        reader.array(module.gate_up_proj).transpose(0, 2, 1),
        reader.array(module.down_proj).transpose(0, 2, 1),
        reader.array(module.gate_up_proj_bias),
        reader.array(module.down_proj_bias),
        alpha=module.alpha,
        beta=1.0,
        limit=module.limit,
    )
