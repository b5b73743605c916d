"""An exported graph changed in memory, so that it scores trees of tokens and projects only what is asked.

Two inputs are added. `tree_mask` is added to each layer's attention mask: zero leaves the graph as it was. `flat`
picks hidden states just before the language-model head. A graph of another form goes without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from export.runtime import GRAPH, physical_cores

TREE_MASK, FLAT = "tree_mask", "flat"
ELEMENTWISE = {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Sub", "Tanh"}  # what may follow the head


def open_session(folder: Path, float_products: bool = False) -> tuple[ort.InferenceSession, bool]:
    """A session of the artifact in `folder`, with the two inputs where its graph has the form they need.

    Args:
        float_products: multiply int8 weights in float32, with activations that are not quantised.

    Returns:
        The session, and whether it quantises activations as it runs, with scales that depend on the whole batch.
    """
    model = onnx.load(folder / GRAPH, load_external_data=False)
    graph = model.graph
    del graph.value_info[:]  # inferred again when the graph is loaded
    pick_before_head(graph)
    mask_trees(graph)
    drop_nan_guards(graph)
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # each batch has a shape of its own
    options.add_session_config_entry("session.force_spinning_stop", "1")  # torch's threads work between two runs
    # Weights in a file of their own are read from there.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if float_products:
        multiply_in_float(graph)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps no float weights
    quantizes = any(node.op_type == "DynamicQuantizeLinear" for node in graph.node)
    data = model.SerializeToString()
    del model, graph
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]), quantizes


def pick_before_head(graph: Any) -> None:
    """Let the head see the (1, M, H) hidden states at `flat` alone."""
    made = {name: node for node in graph.node for name in node.output}
    search = [made["logits"]]
    while search and search[-1].op_type not in ("MatMul", "MatMulInteger"):
        node = search.pop()
        if node.op_type in ELEMENTWISE:
            search += [made[name] for name in node.input if name in made]
    if not search:
        return
    head = search[-1]
    source = made.get(head.input[0])
    if source is not None and source.op_type == "DynamicQuantizeLinear":
        head = source
    hidden = head.input[0]
    rows, picked, axis = (f"{hidden}/{name}" for name in ("rows", "picked", "axis"))
    place = next(index for index, node in enumerate(graph.node) if node is head)
    for node in (
        helper.make_node("Unsqueeze", [f"{picked}/rows", axis], [picked], name=picked),
        helper.make_node("Gather", [rows, FLAT], [f"{picked}/rows"], name=f"{picked}/rows"),
        helper.make_node("Flatten", [hidden], [rows], name=rows, axis=2),
    ):
        graph.node.insert(place, node)
    head.input[0] = picked
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), axis))
    graph.input.append(helper.make_tensor_value_info(FLAT, TensorProto.INT64, ["picked"]))
    logits = next(output for output in graph.output if output.name == "logits")
    for dimension, name in zip(logits.type.tensor_type.shape.dim, ("one", "picked"), strict=False):
        dimension.dim_param = name


def mask_trees(graph: Any) -> None:
    """Add `tree_mask`, (B or 1, 1, T or 1, past and T or 1) float32, to each mask that is added to attention scores."""
    tables = {item.name for item in graph.initializer if len(item.dims) == 2}
    computed = {item.name for item in graph.input if item.name.startswith("past_key_values.")}
    made: dict[str, Any] = {}
    masked = []
    for node in graph.node:  # in topological order
        looked_up = node.op_type == "Gather" and node.input[0] in tables
        if looked_up or (node.op_type != "Shape" and not computed.isdisjoint(node.input)):
            computed.update(node.output)
        made.update((name, node) for name in node.output)
        scores = made.get(node.input[0]) if node.op_type == "Softmax" else None
        if scores is not None and scores.op_type == "Add":
            # Scores come from the texts, a mask from their lengths alone.
            masks = [place for place, name in enumerate(scores.input) if name not in computed]
            if len(masks) == 1:
                masked.append((scores, masks[0]))
    for scores, place in masked:
        mask = scores.input[place]
        both = f"{scores.output[0]}/mask"
        before = next(index for index, node in enumerate(graph.node) if node is scores)
        graph.node.insert(before, helper.make_node("Add", [mask, TREE_MASK], [both], name=both))
        scores.input[place] = both
    if masked:
        shape: list[str | int | None] = ["tree_batch", 1, "tree_length", "tree_total"]
        graph.input.append(helper.make_tensor_value_info(TREE_MASK, TensorProto.FLOAT, shape))


def drop_nan_guards(graph: Any) -> None:
    """Leave out Where(IsNaN(x), 0, x) behind each Softmax x: an eighth of the time.

    It is there for tokens that attend to nothing. In a batch each one attends to itself, padding too.
    """
    made = {name: node for node in graph.node for name in node.output}
    plain: dict[str, str] = {}
    guards = []
    for node in graph.node:
        test = made.get(node.input[0]) if node.op_type == "Where" else None
        if test is None or test.op_type != "IsNaN" or test.input[0] != node.input[2]:
            continue
        if made[node.input[2]].op_type == "Softmax":
            plain[node.output[0]] = node.input[2]
            guards += [node, test]
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in plain:
                node.input[place] = plain[name]
    for node in guards:
        graph.node.remove(node)


def multiply_in_float(graph: Any) -> None:
    """Replace each MatMulInteger and the quantisation before it by the float32 product of the same weights."""
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            values, scale, _ = node.output
            one = numpy_helper.from_array(np.array(1, np.float32))
            nodes.append(helper.make_node("Identity", [node.input[0]], [values]))
            nodes.append(helper.make_node("Constant", [], [scale], value=one))
        elif node.op_type == "MatMulInteger":
            out = node.output[0]
            weights = f"{out}/weights"
            nodes.append(helper.make_node("Cast", [node.input[1]], [weights], to=TensorProto.FLOAT))
            if len(node.input) > 3 and node.input[3]:
                nodes.append(helper.make_node("Cast", [node.input[3]], [f"{out}/zero"], to=TensorProto.FLOAT))
                nodes.append(helper.make_node("Sub", [weights, f"{out}/zero"], [f"{out}/centred"]))
                weights = f"{out}/centred"
            nodes.append(helper.make_node("MatMul", [node.input[0], weights], [out]))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
