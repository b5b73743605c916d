"""One graph that holds two forms of each part of a model, and a switch for each: one session tries every plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SWITCHES = "limbeck.switches"  # (parts,) bool input of the graph; True takes the second form. All False by default.


@dataclass(frozen=True)
class SwitchedGraph:
    """Two graphs in one.

    Attributes:
        model: onnx.ModelProto with the input SWITCHES.
        parts: the parts that differ, in the order of the switches.
        added_bytes: of weights, by part: the second form less the first.
    """

    model: Any
    parts: list[str]
    added_bytes: dict[str, int]

    def switches(self, taken: Iterable[str]) -> np.ndarray:
        """Return the value of SWITCHES that takes the second form of the parts `taken`."""
        chosen = set(taken)
        return np.array([part in chosen for part in self.parts])


def switch_graphs(first: Any, second: Any, part_of_output: Mapping[str, str]) -> SwitchedGraph:
    """Put two forms of one float32 graph together. Changes both.

    Args:
        first, second: onnx.ModelProto of the same nodes, but for those that compute the outputs in `part_of_output`.
        part_of_output: the part of the model, by name of a tensor that both compute.
    """
    from onnx import TensorProto, helper, numpy_helper

    _rename_equal_names(first, second)
    shared = {node.SerializeToString() for node in first.graph.node} & {
        node.SerializeToString() for node in second.graph.node
    }
    forms = [_Form(model, shared) for model in (first, second)]
    outputs = [name for name in part_of_output if all(name in form.producers for form in forms)]
    parts = list(dict.fromkeys(part_of_output[name] for name in outputs))
    sizes = {item.name: len(item.raw_data) for model in (first, second) for item in model.graph.initializer}
    used: dict[str, list[set[str]]] = {part: [set(), set()] for part in parts}
    nodes: list[Any] = []
    for node in first.graph.node:
        name = node.output[0]
        if name in outputs:
            part = part_of_output[name]
            index, switch = f"{name}/part", f"{name}/switch"
            place = numpy_helper.from_array(np.array(parts.index(part), np.int64), index)
            first.graph.initializer.append(place)
            branches = [form.branch(name, f"/form{number}") for number, form in enumerate(forms)]
            for names, branch in zip(used[part], branches, strict=True):
                names.update(item for inner in branch.node for item in inner.input if item in sizes)
            nodes.append(helper.make_node("Gather", [SWITCHES, index], [switch], switch))
            nodes.append(
                helper.make_node("If", [switch], [name], name, else_branch=branches[0], then_branch=branches[1])
            )
        elif node.SerializeToString() in shared or name not in forms[0].inner(outputs):
            nodes.append(node)
    del first.graph.node[:]
    first.graph.node.extend(nodes)
    known = {item.name for item in first.graph.initializer}
    first.graph.initializer.extend(item for item in second.graph.initializer if item.name not in known)
    first.graph.initializer.append(numpy_helper.from_array(np.zeros(len(parts), bool), SWITCHES))
    first.graph.input.append(helper.make_tensor_value_info(SWITCHES, TensorProto.BOOL, [len(parts)]))
    added = {
        part: sum(sizes[name] for name in names[1]) - sum(sizes[name] for name in names[0])
        for part, names in used.items()
    }
    return SwitchedGraph(first, parts, added)


class _Form:
    """The nodes of a graph that are not in the other graph, by output."""

    def __init__(self, model: Any, shared: set[bytes]) -> None:
        own = [node for node in model.graph.node if node.SerializeToString() not in shared]
        self._order = {name: place for place, node in enumerate(own) for name in node.output}
        self.producers = {name: node for node in own for name in node.output}
        self._inner: set[str] | None = None

    def inner(self, outputs: list[str]) -> set[str]:
        """Names of the tensors that only the parts use."""
        if self._inner is None:
            self._inner = {name for output in outputs for node in self._nodes(output) for name in node.output}
        return self._inner

    def branch(self, output: str, suffix: str) -> Any:
        """Return the nodes that compute `output` as a graph, whose tensors get a suffix."""
        from onnx import NodeProto, helper

        nodes = []
        own = {name for node in self._nodes(output) for name in node.output if name}
        for node in self._nodes(output):
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name += suffix
            for names in (copy.input, copy.output):
                names[:] = [f"{name}{suffix}" if name in own else name for name in names]
            nodes.append(copy)
        return helper.make_graph(nodes, f"{output}{suffix}", [], [helper.make_empty_tensor_value_info(output + suffix)])

    def _nodes(self, output: str) -> list[Any]:
        found, search = {}, [output]
        while search:
            name = search.pop()
            if name in self.producers and self._order[name] not in found:
                node = self.producers[name]
                found[self._order[name]] = node
                search += node.input
        return [found[place] for place in sorted(found)]


def _rename_equal_names(first: Any, second: Any) -> None:
    """Rename initializers of `second` that differ from those of the same name in `first`."""
    values = {item.name: item for item in first.graph.initializer}
    names = {}
    for item in second.graph.initializer:
        if item.name in values and item.SerializeToString() != values[item.name].SerializeToString():
            names[item.name] = f"{item.name}/second"
            item.name = names[item.name]
    for node in second.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
