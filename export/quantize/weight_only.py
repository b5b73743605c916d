"""Weights in blocks of 4 or 8 bits: com.microsoft's MatMulNBits, GatherBlockQuantized for tables of tokens, and QMoE.

Weights whose values lie in blocks already keep them (`carry_over`). Others are rounded by GPTQ with the moments of
their inputs (`calibrate`), or to nearest. A block is `block_size` consecutive inputs of one output channel. It has its
own scale, and a zero point unless it is symmetric. Activations stay float32 between operators. With accuracy_level 4
the product rounds them to int8 per token and block, so a text's result does not depend on the rest of the batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.export.graph.external_data import tensor_array, with_data
from limbeck.export.quantize.blocks.calibration import input_moments
from limbeck.export.quantize.blocks.carried import BLOCK, find_grid
from limbeck.export.quantize.blocks.formats import BlockFormat, Packed, WeightNode, pack
from limbeck.export.quantize.blocks.gptq import gptq, inverse_factor
from limbeck.export.quantize.blocks.nodes import BlockNodes
from limbeck.export.quantize.experts import ExpertNode, find_expert_nodes, quantize_experts
from limbeck.export.quantize.token_tables import find_token_embedding, find_token_tables, load_with_gemm_as_matmul

BLOCK_SIZES = (128, 64, 32, 16)
LAYER = re.compile(r"(?:layers|h|layer|blocks)[./](\d+)[./]([a-z_]+)")


@dataclass
class GraphWeights:
    """A float32 graph taken apart into nodes and weights, to build quantized graphs from.

    Attributes:
        graph: the graph's file; large weights stay in the file beside it, until they are needed.
        model: onnx.ModelProto without its initializers.
        tensors: the initializers by name.
        weight_nodes: the nodes whose weight can be quantized, in the graph's order.
        expert_nodes: the mixtures of experts.
        embedding: name of the token embedding; a tied head reads it too. None if there is none to quantize.
    """

    graph: Path
    model: Any
    tensors: dict[str, Any]
    weight_nodes: list[WeightNode]
    expert_nodes: list[ExpertNode]
    embedding: str | None
    _packed: dict[tuple[str, int, int, bool], tuple[np.ndarray, ...]] = field(default_factory=dict)
    _chosen: dict[tuple[str, int], Packed] = field(default_factory=dict)  # by weight and bits; others round to nearest
    _carried_bits: dict[str, int] = field(default_factory=dict)  # weights that keep more bits than a plan gives them

    @classmethod
    def from_graph(cls, graph: Path) -> GraphWeights:
        """Load the float32 file `graph`; its Gemm nodes become MatMul and Add."""
        model = load_with_gemm_as_matmul(graph)
        products, embedding = _find_weight_nodes(model.graph), find_token_embedding(model.graph)
        experts = find_expert_nodes(model.graph, _group)
        tensors = {item.name: item for item in model.graph.initializer}
        del model.graph.initializer[:]
        return cls(graph, model, tensors, products, experts, embedding)

    @property
    def groups(self) -> list[str]:
        """The parts of the model that get one format each, in the graph's order; experts come last."""
        groups = [node.group for node in self.weight_nodes] + [node.group for node in self.expert_nodes]
        return list(dict.fromkeys(groups))

    def carry_over(self, bits: int) -> dict[str, int]:
        """Find the weights that were quantized before, to keep their blocks in a graph of `bits` bits.

        In a graph of 4 bits, a weight on the levels of Q8_0 keeps its 8 bits. If some weights are on levels, those that
        are not, such as k-quants of 6 bits, are rounded to 8 bits.

        Returns how many weights keep 4 and 8 bits, and how many are `rounded`: none is if none keeps its blocks.
        """
        counts = {"4 bits": 0, "8 bits": 0, "rounded": 0}
        products = {product.weight: product for product in self.weight_nodes}
        for weight, product in products.items():
            for width in (4, 8) if bits == 4 else (8,):
                found = find_grid(self._inputs_first(product), width)
                if found and not (product.outputs_first and found[1].minima is not None):  # a lookup has no minima
                    self._chosen[weight, width] = pack(*found)
                    self._carried_bits[weight] = width
                    break
            counts[f"{self._carried_bits[weight]} bits" if weight in self._carried_bits else "rounded"] += 1
        if not self._carried_bits:
            return {}
        if bits == 4:
            self._carried_bits = dict.fromkeys(products, 8) | self._carried_bits
        return counts

    def calibrate(self, artifact: Path, scratch: Path, texts: Sequence[str]) -> None:
        """Round the weights of products to 4 bits by GPTQ, with the moments of their inputs over `texts`.

        Tables that are only looked up and weights with blocks of their own stay as they are. A table that a tied head
        multiplies is rounded for the head.

        Args:
            artifact: folder with the float32 graph that this was made from.
            scratch: an empty folder on the same disk.
            texts: text to calibrate on.
        """
        readers: dict[str, list[WeightNode]] = {}
        for product in self.weight_nodes:
            odd_table = product.outputs_first and product.inputs % BLOCK  # a lookup has no shorter last block
            if product.input_name and not odd_table and product.weight not in self._carried_bits:
                readers.setdefault(product.input_name, []).append(product)
        widths = {name: products[0].inputs for name, products in readers.items()}
        for name, moments in input_moments(artifact, scratch, widths, texts):
            factor = inverse_factor(moments)
            for product in readers[name]:
                rounded = gptq(self._inputs_first(product), np.diag(moments), factor, 4, BLOCK)
                self._chosen[product.weight, 4] = pack(*rounded)

    def pack(self, product: WeightNode, blocks: BlockFormat) -> Packed:
        """Return a weight of K inputs and N outputs in `blocks`: as it was carried over or calibrated, or to nearest.

        The result is cached.
        """
        chosen = self._chosen.get((product.weight, blocks.bits))
        if chosen and not blocks.symmetric and blocks.block_size == BLOCK:
            return chosen
        key = (product.weight, blocks.bits, blocks.block_size, blocks.symmetric)
        if key not in self._packed:
            self._packed[key] = _pack(self._inputs_first(product), blocks)
        return Packed(*self._packed[key])

    def _inputs_first(self, product: WeightNode) -> np.ndarray:
        """The (K, N) weight of a product."""
        weight = self._array(product.weight)
        return weight.T if product.outputs_first else weight

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
        return tensor_array(self.tensors[weight], self.graph)

    def clear_packed(self) -> None:
        """Free the cache of quantized weights."""
        self._packed.clear()

    def format_for(self, product: WeightNode, blocks: BlockFormat) -> BlockFormat | None:
        """Return the format of a weight in a graph of `blocks`.

        That is `blocks`, but for a table with a block size that divides its width (None if none does), and for weights
        that were carried over or calibrated with theirs.
        """
        bits = max(blocks.bits, self._carried_bits.get(product.weight, 0))
        if (product.weight, bits) in self._chosen:
            return replace(blocks, bits=bits, block_size=BLOCK, symmetric=False)
        if bits > blocks.bits:
            blocks = replace(blocks, bits=bits, symmetric=True)
        if not product.outputs_first:
            return blocks
        for block in BLOCK_SIZES:
            if block <= blocks.block_size and product.inputs % block == 0:
                return replace(blocks, block_size=block)
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
        quantized_nodes = BlockNodes()
        nodes: list[Any] = []
        initializers: dict[str, Any] = {}
        for node in model.graph.node:
            if node.output[0] in chosen:
                product, blocks = chosen[node.output[0]]
                nodes += quantized_nodes.replace(node, product, blocks, self.pack(product, blocks))
            elif node.output[0] in experts:
                quantized, tensors = self._quantize_experts(node, experts[node.output[0]], plan)
                initializers |= {tensor.name: tensor for tensor in tensors}
                nodes.append(quantized)
            else:
                nodes.append(node)
        nodes = _drop_unused_nodes([*quantized_nodes.constants, *nodes], {item.name for item in model.graph.output})
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input}
        kept = (with_data(tensor, self.graph) for name, tensor in self.tensors.items() if name in read)
        model.graph.initializer.extend(kept)
        model.graph.initializer.extend([*initializers.values(), *quantized_nodes.tensors.values()])
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
        source = "" if node.op_type == "Gather" else node.input[0]
        found.append(WeightNode(node.output[0], weight, outputs_first, inputs, outputs, group, source))
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
    if (np.abs(scales) > 2.0**-14).all():  # a normal number in float16, which is stored in half the bytes
        scales = scales.astype(np.float16).astype(np.float32)
    return (codes, scales) if blocks.symmetric else (codes, scales, zeros)


def _drop_unused_nodes(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """Remove nodes whose outputs nothing reads."""
    kept, read = [], set(outputs)
    for node in reversed(nodes):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    return kept[::-1]
