"""Weights in blocks of 4 or 8 bits: com.microsoft's MatMulNBits, GatherBlockQuantized for tables of tokens, and QMoE.

A block is `block_size` consecutive inputs of one output channel. It has its own scale, and a zero point unless it is
symmetric. Activations stay float32 between operators. With accuracy_level 4 the product rounds them to int8 per token
and block, so a text's result does not depend on the rest of the batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.export.quantize.experts import ExpertNode, find_expert_nodes, quantize_experts
from limbeck.export.quantize.token_tables import find_token_embedding, find_token_tables, load_with_gemm_as_matmul

BLOCK_SIZES = (128, 64, 32, 16)
LAYER = re.compile(r"(?:layers|h|layer|blocks)[./](\d+)[./]([a-z_]+)")


@dataclass(frozen=True)
class BlockFormat:
    """How a weight is stored.

    Attributes:
        bits: 4 or 8.
        block_size: inputs that share a scale.
        symmetric: no zero points.
        accuracy_level: of MatMulNBits; 0 computes in float32, 4 rounds activations to int8.
    """

    bits: int
    block_size: int
    symmetric: bool = False
    accuracy_level: int = 4

    def to_manifest(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        return {
            "bits": self.bits,
            "block_size": self.block_size,
            "symmetric": self.symmetric,
            "accuracy_level": self.accuracy_level,
        }


@dataclass(frozen=True)
class WeightNode:
    """A node that reads a weight: a product with a constant, or a lookup in a table of tokens.

    Attributes:
        output_name: the node's output.
        weight: name of the initializer.
        outputs_first: the weight is (out, in), not (in, out): it is a table of tokens.
        group: part of the model that gets one format, such as "layers.3.mlp".
    """

    output_name: str
    weight: str
    outputs_first: bool
    inputs: int
    outputs: int
    group: str


@dataclass
class GraphWeights:
    """A float32 graph taken apart into nodes and weights, to build quantized graphs from.

    Attributes:
        model: onnx.ModelProto without its initializers.
        tensors: the initializers by name.
        weight_nodes: the nodes whose weight can be quantized, in the graph's order.
        expert_nodes: the mixtures of experts.
        embedding: name of the token embedding; a tied head reads it too. None if there is none to quantize.
    """

    model: Any
    tensors: dict[str, Any]
    weight_nodes: list[WeightNode]
    expert_nodes: list[ExpertNode]
    embedding: str | None
    _packed: dict[tuple[str, int, int, bool], tuple[np.ndarray, ...]] = field(default_factory=dict)

    @classmethod
    def from_graph(cls, graph: Path) -> GraphWeights:
        """Load the float32 file `graph`; its Gemm nodes become MatMul and Add."""
        model = load_with_gemm_as_matmul(graph)
        products, embedding = _find_weight_nodes(model.graph), find_token_embedding(model.graph)
        experts = find_expert_nodes(model.graph, _group)
        tensors = {item.name: item for item in model.graph.initializer}
        del model.graph.initializer[:]
        return cls(model, tensors, products, experts, embedding)

    @property
    def groups(self) -> list[str]:
        """The parts of the model that get one format each, in the graph's order; experts come last."""
        groups = [node.group for node in self.weight_nodes] + [node.group for node in self.expert_nodes]
        return list(dict.fromkeys(groups))

    def pack(self, product: WeightNode, blocks: BlockFormat) -> tuple[np.ndarray, ...]:
        """Quantize a weight of K inputs and N outputs, rounding to nearest. The result is cached.

        Returns (N, K / block_size, bytes) uint8 codes, (N, K / block_size) float32 scales and, unless symmetric, packed
        zero points.
        """
        key = (product.weight, blocks.bits, blocks.block_size, blocks.symmetric)
        if key not in self._packed:
            weight = self._array(product.weight)
            self._packed[key] = _pack(weight.T if product.outputs_first else weight, blocks)
        return self._packed[key]

    def pack_experts(self, weight: str, blocks: BlockFormat) -> tuple[np.ndarray, ...]:
        """Quantize the weight (E, N, K) of E experts, as `pack` does. The codes of a row are one run of bytes."""
        key = (weight, blocks.bits, blocks.block_size, blocks.symmetric)
        if key not in self._packed:
            packed = [_pack(each.T, blocks) for each in self._array(weight)]
            rows = len(packed[0][0])
            self._packed[key] = tuple(
                np.stack([part.reshape(rows, -1) for part in parts]) for parts in zip(*packed, strict=True)
            )
        return self._packed[key]

    def _array(self, weight: str) -> np.ndarray:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.tensors[weight])

    def clear_packed(self) -> None:
        """Free the cache of quantized weights."""
        self._packed.clear()

    def format_for(self, product: WeightNode, blocks: BlockFormat) -> BlockFormat | None:
        """Return `blocks`, for a table with a block size that divides its width; None if none does."""
        if not product.outputs_first:
            return blocks
        for block in BLOCK_SIZES:
            if block <= blocks.block_size and product.inputs % block == 0:
                return BlockFormat(blocks.bits, block, blocks.symmetric, blocks.accuracy_level)
        return None

    def quantize(self, plan: Mapping[str, BlockFormat | None]) -> Any:
        """Build the graph with each group in the format of `plan`; None leaves a group in float32."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        chosen = {}
        for product in self.weight_nodes:
            blocks = plan.get(product.group)
            blocks = self.format_for(product, blocks) if blocks else None
            if blocks:
                chosen[product.output_name] = (product, blocks)
        experts = {node.output_name: node for node in self.expert_nodes if plan.get(node.group)}
        nodes, initializers = [], {}
        for node in model.graph.node:
            if node.output[0] in chosen:
                product, blocks = chosen[node.output[0]]
                for tensor in _tensors(product, blocks, self.pack(product, blocks)):
                    initializers[tensor.name] = tensor
                nodes += _nodes(node, product, blocks)
            elif node.output[0] in experts:
                quantized, tensors = self._quantize_experts(node, experts[node.output[0]], plan)
                initializers |= {tensor.name: tensor for tensor in tensors}
                nodes.append(quantized)
            else:
                nodes.append(node)
        nodes = _drop_unused_nodes(nodes, {item.name for item in model.graph.output})
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input}
        model.graph.initializer.extend(tensor for name, tensor in self.tensors.items() if name in read)
        model.graph.initializer.extend(initializers.values())
        if chosen and not any(opset.domain == "com.microsoft" for opset in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        return model

    def _quantize_experts(
        self, node: Any, experts: ExpertNode, plan: Mapping[str, BlockFormat | None]
    ) -> tuple[Any, list[Any]]:
        blocks = plan[experts.group]
        assert blocks is not None
        blocks = replace(blocks, block_size=experts.block_size(blocks.block_size, BLOCK_SIZES))
        packed = [self.pack_experts(weight, blocks) for weight in experts.weights]
        attributes = {"block_size": blocks.block_size, "accuracy_level": blocks.accuracy_level}
        return quantize_experts(node, experts, packed, blocks.bits, **attributes)


def _find_weight_nodes(graph: Any) -> list[WeightNode]:
    tensors = {item.name: item for item in graph.initializer if item.data_type == 1 and len(item.dims) == 2}
    table, tables = find_token_embedding(graph), find_token_tables(graph)
    # optimum's head reads the table through a Transpose, the fused graph's through a Reshape to the same shape.
    views = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type in ("Transpose", "Reshape") and node.input[0] == table
    }
    found = []
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in tables:
            weight, outputs_first = node.input[0], True
        elif node.op_type in ("MatMul", "FusedMatMul") and node.input[1] in views:
            weight, outputs_first = views[node.input[1]], True
        elif node.op_type == "MatMul" and node.input[1] in tensors:
            weight, outputs_first = node.input[1], False
        else:
            continue
        inputs, outputs = tensors[weight].dims
        if outputs_first:
            inputs, outputs = outputs, inputs
        group = "embedding" if weight in tables else _group(node.name or node.output[0])
        found.append(WeightNode(node.output[0], weight, outputs_first, inputs, outputs, group))
    return found


def _group(name: str) -> str:
    """Return the group of a node, from its name: such as "layers.3.mlp", or "head" outside of the layers."""
    match = LAYER.search(name)
    return f"layers.{match[1]}.{match[2]}" if match else "head"


def _pack(weight: np.ndarray, blocks: BlockFormat) -> tuple[np.ndarray, ...]:
    """Quantize (K, N) float32, rounding to nearest. Returns codes, scales and, unless symmetric, zero points."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(blocks.block_size, blocks.symmetric, bits=blocks.bits)
    codes, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight))
    return (codes, scales) if blocks.symmetric else (codes, scales, zeros)


def _names(product: WeightNode, blocks: BlockFormat) -> list[str]:
    names = [f"{product.weight}_{blocks.bits}bits", f"{product.weight}_{blocks.bits}bits_scales"]
    return names if blocks.symmetric else [*names, f"{product.weight}_{blocks.bits}bits_zeros"]


def _tensors(product: WeightNode, blocks: BlockFormat, packed: tuple[np.ndarray, ...]) -> list[Any]:
    from onnx import numpy_helper

    tensors = list(packed)
    names = _names(product, blocks)
    if product.outputs_first:  # the lookup reads a row as one run of bytes, a tied head reads it as blocks
        tensors = [packed[0].reshape(len(packed[0]), -1), *packed[1:], np.array(packed[0].shape, np.int64)]
        names = [*names, f"{product.weight}_shape"]
    return [numpy_helper.from_array(tensor, name) for tensor, name in zip(tensors, names, strict=True)]


def _nodes(node: Any, product: WeightNode, blocks: BlockFormat) -> list[Any]:
    """Return the quantized form of a MatMul or of the lookup."""
    from onnx import helper

    names, out = _names(product, blocks), node.output[0]
    common: dict[str, Any] = {"domain": "com.microsoft", "bits": blocks.bits, "block_size": blocks.block_size}
    if node.op_type == "Gather":
        inputs = [names[0], node.input[1], *names[1:]]
        return [
            helper.make_node("GatherBlockQuantized", inputs, [out], node.name, gather_axis=0, quantize_axis=1, **common)
        ]
    before = []
    if product.outputs_first:
        blocked = f"{names[0]}_blocked"
        before = [helper.make_node("Reshape", [names[0], f"{product.weight}_shape"], [blocked], blocked)]
        names = [blocked, *names[1:]]
    sizes: dict[str, Any] = {"K": product.inputs, "N": product.outputs}
    return [
        *before,
        helper.make_node(
            "MatMulNBits",
            [node.input[0], *names],
            [out],
            node.name,
            accuracy_level=blocks.accuracy_level,
            **sizes,
            **common,
        ),
    ]


def _drop_unused_nodes(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """Remove nodes whose outputs nothing reads."""
    kept, read = [], set(outputs)
    for node in reversed(nodes):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    return kept[::-1]
