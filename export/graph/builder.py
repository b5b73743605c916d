"""Build an ONNX graph node by node, with the parts that every block uses: products, norms, activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.export.graph.decoder import XIELU, Linear, Norm

if TYPE_CHECKING:
    import onnx

# Activation -> (operator, its domain, its attributes).
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "silu": ("QuickGelu", "com.microsoft", {"alpha": 1.0}),
    "quick_gelu": ("QuickGelu", "com.microsoft", {"alpha": 1.702}),
    "gelu": ("Gelu", "", {}),
    "gelu_tanh": ("Gelu", "", {"approximate": "tanh"}),
    "relu": ("Relu", "", {}),
}


class SideBySide:
    """Matrices (in, out) side by side, joined as they are written: until then no copy is held."""

    def __init__(self, *parts: np.ndarray) -> None:
        self._parts = parts
        self.shape = (len(parts[0]), sum(part.shape[1] for part in parts))
        self.dtype = parts[0].dtype
        self.nbytes = sum(part.nbytes for part in parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts, axis=1, dtype=dtype)


@dataclass
class GraphBuilder:
    """Collects nodes and initializers. Methods take and return names of tensors.

    Attributes:
        initializers: arrays by name; those of a model share its memory.
        keys_and_values: the new keys and values of the layers so far, by index.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, np.ndarray | SideBySide] = field(default_factory=dict)
    keys_and_values: dict[int, list[str]] = field(default_factory=dict)

    def node(
        self, op: str, inputs: list[str], output: str, *more: str, domain: str = "", name: str = "", **attributes: Any
    ) -> str:
        """Add a node, named after its first output. Returns that output."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output, *more], name or output, domain=domain, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray | SideBySide) -> str:
        """Add an initializer, unless there is one of this name: that one is assumed to be equal."""
        self.initializers.setdefault(name, value)
        return name

    def number(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, np.float32))

    def ints(self, *values: int) -> str:
        return self.constant("ints." + "_".join(map(str, values)), np.array(values, np.int64))

    def linear(self, x: str, linear: Linear) -> str:
        y = self.node("MatMul", [x, self.constant(f"{linear.name}.weight", linear.weight)], f"{linear.name}.out")
        if linear.bias is None:
            return y
        return self.node("Add", [y, self.constant(f"{linear.name}.bias", linear.bias)], f"{linear.name}.biased")

    def linear_pair(self, x: str, first: Linear, second: Linear, name: str, outputs: tuple[str, str]) -> None:
        """Compute two products of the same size as one: threads wait for each other once, not twice."""
        assert (first.bias is None) == (second.bias is None)
        weight = self.constant(f"{name}.weight", SideBySide(first.weight, second.weight))
        both = self.node("MatMul", [x, weight], f"{name}.out")
        if first.bias is not None and second.bias is not None:
            bias = self.constant(f"{name}.bias", np.concatenate([first.bias, second.bias]))
            both = self.node("Add", [both, bias], f"{name}.biased")
        self.node("Split", [both], *outputs, axis=-1, num_outputs=2)

    def norm(self, x: str, norm: Norm) -> str:
        weight, out = self.constant(f"{norm.name}.weight", norm.weight), f"{norm.name}.out"
        if norm.bias is None:
            return self.node("SimplifiedLayerNormalization", [x, weight], out, axis=-1, epsilon=norm.eps, stash_type=1)
        bias = self.constant(f"{norm.name}.bias", norm.bias)
        return self.node("LayerNormalization", [x, weight, bias], out, axis=-1, epsilon=norm.eps)

    def add_and_norm(self, x: str, y: str, norm: Norm | None, total: str) -> tuple[str, str]:
        """Compute x + y and its norm in one operator. Returns (sum, normed sum); they are the same if norm is None."""
        if norm is None:
            added = self.node("Add", [x, y], total)
            return added, added
        inputs = [x, y, self.constant(f"{norm.name}.weight", norm.weight)]
        op = "SkipSimplifiedLayerNormalization"
        if norm.bias is not None:
            op = "SkipLayerNormalization"
            inputs.append(self.constant(f"{norm.name}.bias", norm.bias))
        out = self.node(op, inputs, f"{norm.name}.out", "", "", total, domain="com.microsoft", epsilon=norm.eps)
        return total, out

    def activation(self, x: str, activation: str | XIELU, output: str) -> str:
        """Apply an activation: a key of ACTIVATIONS, relu2 (the square of relu) or xIELU."""
        if isinstance(activation, XIELU):
            return self._xielu(x, activation, output)
        if activation == "relu2":
            relu = self.node("Relu", [x], f"{output}.relu")
            return self.node("Mul", [relu, relu], output)
        op, domain, attributes = ACTIVATIONS[activation]
        return self.node(op, [x], output, domain=domain, **attributes)

    def _xielu(self, x: str, xielu: XIELU, output: str) -> str:
        positive, negative, beta, eps = (
            self.number(f"{output}.{name}", getattr(xielu, name)) for name in ("positive", "negative", "beta", "eps")
        )
        square = self.node("Mul", [self.node("Mul", [x, x], f"{output}.square"), positive], f"{output}.right")
        power = self.node("Exp", [self.node("Clip", [x, "", eps], f"{output}.left.min")], f"{output}.left.exp")
        less = self.node("Sub", [power, self.number("one", 1.0)], f"{output}.left.expm1")
        left = self.node("Mul", [self.node("Sub", [less, x], f"{output}.left.less"), negative], f"{output}.left")
        is_right = self.node("Greater", [x, self.number("zero", 0.0)], f"{output}.is_right")
        side = self.node("Where", [is_right, square, left], f"{output}.side")
        return self.node("Add", [side, self.node("Mul", [x, beta], f"{output}.linear")], output)
