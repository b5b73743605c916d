"""The tensors and nodes of quantized products and lookups."""

from __future__ import annotations

from typing import Any

import numpy as np

from limbeck.export.quantize.blocks.formats import BlockFormat, Packed, WeightNode

MAX_SUM_MATRIX = 2**20  # bytes; the block sums of wider inputs are a reduction, not a product with a constant


class BlockNodes:
    """Builds the nodes in place of products and lookups, and the tensors that they read.

    Attributes:
        constants: nodes that onnxruntime computes once when it loads the graph, for its beginning.
        tensors: the initializers by name.
    """

    def __init__(self) -> None:
        self.constants: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self._sums: set[str] = set()

    def replace(self, node: Any, product: WeightNode, blocks: BlockFormat, packed: Packed) -> list[Any]:
        """Return the quantized form of `node`, a MatMul or a Gather of the weight of `product`."""
        name = self._add_weight(product, blocks, packed)
        names = [name, f"{name}_scales"] + ([] if packed.zeros is None else [f"{name}_zeros"])
        common = {"bits": blocks.bits, "block_size": blocks.block_size}
        out = node.output[0]
        if node.op_type == "Gather":
            inputs = [names[0], node.input[1], *names[1:]]
            axes = {"gather_axis": 0, "quantize_axis": 1}
            return [_node("GatherBlockQuantized", inputs, out, node.name, domain="com.microsoft", **axes, **common)]
        nodes = []
        if product.outputs_first:
            nodes.append(_node("Reshape", [name, f"{product.weight}_shape"], f"{name}_blocked"))
            names[0] = f"{name}_blocked"
        common |= {"K": product.inputs, "N": product.outputs, "accuracy_level": blocks.accuracy_level}
        middle = out if packed.minima is None else f"{out}/codes"
        nodes.append(_node("MatMulNBits", [node.input[0], *names], middle, node.name, domain="com.microsoft", **common))
        if packed.minima is not None:
            nodes += self._add_minima(node.input[0], product, name, middle, out)
        return nodes

    def _add_weight(self, product: WeightNode, blocks: BlockFormat, packed: Packed) -> str:
        """Add the tensors of a weight, once. Returns the name of its codes, which begins those of the others."""
        name = f"{product.weight}_{blocks.bits}bits"
        if name in self.tensors:
            return name
        codes = packed.codes
        if product.outputs_first:  # the lookup reads a row as one run of bytes, a tied head reads it as blocks
            self._add(f"{product.weight}_shape", np.array(codes.shape, np.int64))
            codes = codes.reshape(len(codes), -1)
        self._add(name, codes)
        if packed.zeros is not None:
            self._add(f"{name}_zeros", packed.zeros)
        in_float16 = blocks.accuracy_level != 0  # a graph for CUDA becomes float16 as a whole
        self._add_floats(f"{name}_scales", packed.scales, in_float16)
        if packed.minima is not None:
            # The value of code 8, where the product has its 0: (B, N).
            self._add_floats(f"{name}_minima", packed.minima, in_float16)
            self._add("code.middle", np.array(8, np.float32))
            self.constants += [
                _node("Mul", [f"{name}_scales", "code.middle"], f"{name}_to_middle"),
                _node("Add", [f"{name}_minima", f"{name}_to_middle"], f"{name}_middle"),
                _node("Transpose", [f"{name}_middle"], f"{name}_offsets", perm=[1, 0]),
            ]
        return name

    def _add_minima(self, values: str, product: WeightNode, name: str, middle: str, out: str) -> list[Any]:
        """Return the nodes that add the product of the block sums of `values` with the offsets of the weight."""
        nodes, sums, count = [], f"{values}/block_sums", product.inputs // 32
        if sums not in self._sums:
            self._sums.add(sums)
            if 4 * product.inputs * count <= MAX_SUM_MATRIX:
                self._add(f"block_sums.{product.inputs}", np.kron(np.eye(count), np.ones((32, 1))).astype(np.float32))
                nodes.append(_node("MatMul", [values, f"block_sums.{product.inputs}"], sums))
            else:
                self._add(f"block_shape.{product.inputs}", np.array([0, 0, count, 32], np.int64))
                self._add("block_axis", np.array([-1], np.int64))
                nodes += [
                    _node("Reshape", [values, f"block_shape.{product.inputs}"], f"{values}/blocks"),
                    _node("ReduceSum", [f"{values}/blocks", "block_axis"], sums, keepdims=0),
                ]
        return [
            *nodes,
            _node("MatMul", [sums, f"{name}_offsets"], f"{out}/offset"),
            _node("Add", [middle, f"{out}/offset"], out, f"{out}/add_offset"),
        ]

    def _add_floats(self, name: str, values: np.ndarray, in_float16: bool) -> None:
        """Add float32 values; as float16 and a cast if that is exact."""
        with np.errstate(over="ignore"):
            short = values.astype(np.float16)
        if not in_float16 or not np.array_equal(short.astype(np.float32), values):
            self._add(name, values)
            return
        self._add(f"{name}_float16", short)
        self.constants.append(_node("Cast", [f"{name}_float16"], name, to=1))

    def _add(self, name: str, values: np.ndarray) -> None:
        from onnx import numpy_helper

        if name not in self.tensors:
            self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)


def _node(op: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(op, inputs, [output], name or output, **attributes)
