"""Write a mixture of experts as com.microsoft's MoE, which computes only the experts that a token chose."""

from __future__ import annotations

from typing import Any

from limbeck.export.graph.blocks import write_mlp
from limbeck.export.graph.builder import GraphBuilder
from limbeck.export.graph.decoder import Experts, Router

# The logit of an expert that was not chosen: exp() of it is 0, and float16 can hold it.
NOT_CHOSEN = -30000.0
MIN_SCORE = 1e-20  # its logarithm is finite


def write_experts(graph: GraphBuilder, experts: Experts, name: str, x: str) -> str:
    """Write the experts of layer `name` over x (B, S, H). Returns their output, (B, S, H)."""
    router = experts.router
    # The router is a FusedMatMul, which no precision quantizes: a small change of its logits chooses other experts.
    weight = graph.constant(f"{router.logits.name}.weight", router.logits.weight)
    logits = graph.node("FusedMatMul", [x, weight], f"{router.logits.name}.out", domain="com.microsoft")
    if router.logits.bias is not None:
        bias = graph.constant(f"{router.logits.name}.bias", router.logits.bias)
        logits = graph.node("Add", [logits, bias], f"{router.logits.name}.biased")
    logits = graph.node("Reshape", [logits, graph.ints(-1, len(experts.down))], f"{name}.router.rows")
    total = None
    if router.sigmoid or router.bias is not None or not router.normalize:
        logits, total = _weigh(graph, router, name, logits)
    inputs = [
        "" if getattr(experts, part) is None else graph.constant(f"{experts.name}.{part}", getattr(experts, part))
        for part in ("gate_up", "gate_up_bias", "down", "down_bias")
    ]
    limit: dict[str, Any] = {"swiglu_limit": experts.limit} if experts.limit else {}
    y = graph.node(
        "MoE",
        [x, logits, *inputs],
        f"{name}.experts",
        domain="com.microsoft",
        k=router.chosen,
        normalize_routing_weights=1,  # QMoE, its form with quantized weights, knows no other
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=experts.alpha,
        activation_beta=experts.beta,
        **limit,
    )
    if total:
        shape = graph.node("Shape", [x], f"{name}.router.batch", start=0, end=2)
        shape = graph.node("Concat", [shape, graph.ints(1)], f"{name}.router.shape", axis=0)
        y = graph.node("Mul", [y, graph.node("Reshape", [total, shape], f"{name}.router.total")], f"{name}.weighed")
    return _add_shared(graph, experts, name, x, y)


def _weigh(graph: GraphBuilder, router: Router, name: str, logits: str) -> tuple[str, str | None]:
    """Compute the weights of the chosen experts from the router's logits (N, E).

    Returns logits (N, E) of which the operator makes these experts and the normalized weights, and what to multiply
    the output with: the sum of the weights, (N, 1), or None if they are to be normalized.
    """
    output = f"{name}.router.scores"
    scores = (
        graph.node("Sigmoid", [logits], output) if router.sigmoid else graph.node("Softmax", [logits], output, axis=-1)
    )
    order = scores
    if router.bias is not None:
        bias = graph.constant(f"{router.logits.name}.choice_bias", router.bias)
        order = graph.node("Add", [scores, bias], f"{name}.router.order")
    best, chosen = f"{name}.router.best", f"{name}.router.chosen"
    weights = graph.node("TopK", [order, graph.ints(router.chosen)], best, chosen, axis=-1)
    if router.bias is not None:
        weights = graph.node("GatherElements", [scores, chosen], f"{name}.router.weights", axis=-1)
    total = None
    if not router.normalize:
        total = graph.node("ReduceSum", [weights, graph.ints(-1)], f"{name}.router.sum", keepdims=1)
    if not router.sigmoid and router.bias is None:
        return logits, total
    positive = graph.node("Clip", [weights, graph.number("router.min", MIN_SCORE)], f"{name}.router.positive")
    logarithms = graph.node("Log", [positive], f"{name}.router.log")
    shape = graph.node("Shape", [scores], f"{name}.router.sizes")
    empty = graph.node("Expand", [graph.number("router.none", NOT_CHOSEN), shape], f"{name}.router.empty")
    return graph.node("ScatterElements", [empty, chosen, logarithms], f"{name}.router.logits", axis=-1), total


def _add_shared(graph: GraphBuilder, experts: Experts, name: str, x: str, y: str) -> str:
    if experts.shared is None:
        return y
    shared = write_mlp(graph, experts.shared, f"{name}.shared", x)
    if experts.shared_gate:
        gate = graph.node("Sigmoid", [graph.linear(x, experts.shared_gate)], f"{name}.shared.gate")
        shared = graph.node("Mul", [shared, gate], f"{name}.shared.gated")
    return graph.node("Add", [y, shared], f"{name}.mixed")
