"""Experts in blocks of 4 or 8 bits: com.microsoft's QMoE in place of MoE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.registry.core.errors import BadInput

WEIGHTS = (2, 4)  # MoE's inputs: gate and up, down; the bias of each follows it


@dataclass(frozen=True)
class ExpertNode:
    """A mixture of experts, whose weights get one format.

    Attributes:
        output_name: the node's output.
        weights: names of the initializers of gate and up, and of down: (E, outputs, inputs) float32.
        inputs: the number of inputs of each.
        group: part of the model that gets one format, such as "layers.3.experts".
    """

    output_name: str
    weights: tuple[str, str]
    inputs: tuple[int, int]
    group: str

    def block_size(self, limit: int, sizes: Sequence[int]) -> int:
        """Return the first of `sizes` that is at most `limit` and divides all inputs. Raises BadInput if none does."""
        for size in sizes:
            if size <= limit and all(count % size == 0 for count in self.inputs):
                return size
        raise BadInput(
            f"{self.group}: experts of {self.inputs[0]} and {self.inputs[1]} inputs, which no block size divides",
            fix="use fp32 or fp16",
        )


def find_expert_nodes(graph: Any, group: Callable[[str], str]) -> list[ExpertNode]:
    """List the nodes with experts of a float32 graph. `group` gives the group of a node from its name."""
    dims = {item.name: tuple(item.dims) for item in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "MoE":
            gate_up, down = (node.input[place] for place in WEIGHTS)
            found.append(
                ExpertNode(node.output[0], (gate_up, down), (dims[gate_up][2], dims[down][2]), group(node.name))
            )
    return found


def quantize_experts(
    node: Any, experts: ExpertNode, packed: Sequence[tuple[np.ndarray, ...]], bits: int, **attributes: Any
) -> tuple[Any, list[Any]]:
    """Return the QMoE node in place of the MoE `node`, and its initializers.

    Args:
        packed: of each weight, codes (E, outputs, bytes) uint8, scales (E, outputs, blocks) float32 and, unless
            symmetric, packed zero points (E, outputs, bytes) uint8.
        **attributes: others of the node.
    """
    from onnx import helper, numpy_helper

    inputs, tensors = list(node.input[:2]), []
    zeros = []
    for weight, bias, parts in zip(experts.weights, (node.input[3], _optional(node, 5)), packed, strict=True):
        names = [f"{weight}_{bits}bits{suffix}" for suffix in ("", "_scales", "_zeros")]
        tensors += [numpy_helper.from_array(part, name) for part, name in zip(parts, names, strict=False)]
        inputs += [*names[:2], bias]
        zeros += names[2:] if len(parts) == 3 else [""]
    fields: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    quantized = helper.make_node(
        "QMoE",
        [*inputs, "", "", "", *zeros],
        [node.output[0]],
        node.name,
        domain="com.microsoft",
        expert_weight_bits=bits,
        weights_prepacked=0,
        **fields,
        **attributes,
    )
    return quantized, tensors


def _optional(node: Any, place: int) -> str:
    return node.input[place] if place < len(node.input) else ""
