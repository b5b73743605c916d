"""An exported graph changed in memory, so that it scores trees of tokens and projects only what is asked.

Two inputs are added. `tree_mask` is added to each layer's attention mask (in a fused graph to the bias of each
GroupQueryAttention): zero leaves the graph as it was. `flat` picks hidden states just before the language-model head.
A graph of another form goes without them.
"""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from limbeck.evals.engines.batches import MAX_ATTENTION_PAIRS
from limbeck.export.runtime.session import GRAPH
from limbeck.registry.core.machine import physical_cores

TREE_MASK, LOGIT_POSITIONS = "tree_mask", "flat"
QDQ = {"QuantizeLinear", "DequantizeLinear"}
ELEMENTWISE = {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Sub", "Tanh", *QDQ}  # what may follow the head
HEAD_OPERATORS = {"FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits"}
MAX_TREE_TOKENS = isqrt(MAX_ATTENTION_PAIRS)  # tokens of a row that shares
ATTENTION, ATTENTION_BIAS_INPUT = "GroupQueryAttention", 10  # the operator, and the place of its attention_bias
IN_FLOAT32, IN_INT8 = 1, 4  # MatMulNBits' accuracy levels: what it rounds its activations to, block by block


def open_session(folder: Path, float_products: bool = False) -> tuple[ort.InferenceSession, bool]:
    """A session of the artifact in `folder`, with the two inputs where its graph has the form they need.

    Args:
        float_products: multiply quantised weights in float32, with activations that are not quantised.

    Returns:
        The session, and whether it quantises activations as it runs: a number then depends a little on what else is
        in the batch, or on the last bit of the one before it.
    """
    model = onnx.load(folder / GRAPH, load_external_data=False)
    graph = model.graph
    del graph.value_info[:]  # inferred again when the graph is loaded
    pick_before_head(graph)
    mask_trees(graph)
    drop_nan_guards(graph)
    lengthen_rotary(graph)
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
    quantizes = any(_quantizes(node) for node in graph.node)
    data = model.SerializeToString()
    del model, graph
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]), quantizes


def _quantizes(node: Any) -> bool:
    """Whether this operator quantises activations."""
    return node.op_type in ("DynamicQuantizeLinear", "QuantizeLinear") or _accuracy_level(node) == IN_INT8


def _accuracy_level(node: Any) -> int:
    """The accuracy level of a MatMulNBits; 0 is whatever onnxruntime likes."""
    found = (item.i for item in node.attribute if item.name == "accuracy_level")
    return int(next(found, 0)) if node.op_type == "MatMulNBits" else 0


def pick_before_head(graph: Any) -> None:
    """Let the head see the (1, M, H) hidden states at `flat` alone."""
    made = {name: node for node in graph.node for name in node.output}
    search = [made["logits"]]
    while search and search[-1].op_type not in HEAD_OPERATORS:
        node = search.pop()
        if node.op_type in ELEMENTWISE:
            search += [made[name] for name in node.input if name in made]
    if not search:
        return
    head = search[-1]
    # Picked before they are quantised: what is quantised and the product stay side by side, and are run as one.
    while (source := made.get(head.input[0])) is not None and source.op_type in {"DynamicQuantizeLinear", *QDQ}:
        head = source
    hidden = head.input[0]
    rows, picked, axis = (f"{hidden}/{name}" for name in ("rows", "picked", "axis"))
    place = next(index for index, node in enumerate(graph.node) if node is head)
    for node in (
        helper.make_node("Unsqueeze", [f"{picked}/rows", axis], [picked], name=picked),
        helper.make_node("Gather", [rows, LOGIT_POSITIONS], [f"{picked}/rows"], name=f"{picked}/rows"),
        helper.make_node("Flatten", [hidden], [rows], name=rows, axis=2),
    ):
        graph.node.insert(place, node)
    head.input[0] = picked
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), axis))
    graph.input.append(helper.make_tensor_value_info(LOGIT_POSITIONS, TensorProto.INT64, ["picked"]))
    logits = next(output for output in graph.output if output.name == "logits")
    for dimension, name in zip(logits.type.tensor_type.shape.dim, ("one", "picked"), strict=False):
        dimension.dim_param = name


def mask_trees(graph: Any) -> None:
    """Add `tree_mask`, (B or 1, 1, T or 1, past and T or 1) float32, to each mask that is added to attention scores."""
    past = next((item for item in graph.input if item.name.startswith("past_key_values.")), None)
    kind = past.type.tensor_type.elem_type if past is not None else TensorProto.FLOAT  # that of the scores too
    tree = TREE_MASK if kind == TensorProto.FLOAT else f"{TREE_MASK}/cast"
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
    masked += [
        (node, ATTENTION_BIAS_INPUT)
        for node in graph.node
        if node.op_type == ATTENTION and _has_input(node, ATTENTION_BIAS_INPUT)
    ]
    added: dict[str, str] = {}  # fused graphs have one mask for all layers
    for node, place in masked:
        mask = node.input[place]
        if mask not in added:
            added[mask] = both = f"{node.output[0]}/mask"
            before = next(index for index, other in enumerate(graph.node) if other is node)
            graph.node.insert(before, helper.make_node("Add", [mask, tree], [both], name=both))
        node.input[place] = added[mask]
    if masked:
        if tree != TREE_MASK:
            graph.node.insert(0, helper.make_node("Cast", [TREE_MASK], [tree], name=tree, to=kind))
        shape: list[str | int | None] = ["tree_batch", 1, "tree_length", "tree_total"]
        graph.input.append(helper.make_tensor_value_info(TREE_MASK, TensorProto.FLOAT, shape))


def _has_input(node: Any, place: int) -> bool:
    return len(node.input) > place and bool(node.input[place])


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


def lengthen_rotary(graph: Any) -> None:
    """Let RotaryEmbedding take rows that are longer than the context: it asks for a table of as many positions.

    No text is longer, so what is added to the tables is never looked up.
    """
    tables = {item.name: item for item in graph.initializer}
    longer: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "RotaryEmbedding"]:
        for place in (2, 3):
            table = node.input[place]
            if table in tables and tables[table].dims[0] < MAX_TREE_TOKENS and table not in longer:
                longer[table] = f"{table}/longer"
                positions, width = tables[table].dims
                zeros = np.zeros(
                    (MAX_TREE_TOKENS - positions, width), helper.tensor_dtype_to_np_dtype(tables[table].data_type)
                )
                graph.initializer.append(numpy_helper.from_array(zeros, f"{table}/more"))
                inputs = [table, f"{table}/more"]
                graph.node.insert(0, helper.make_node("Concat", inputs, [longer[table]], name=longer[table], axis=0))
            node.input[place] = longer.get(table, table)


def multiply_in_float(graph: Any) -> None:
    """Let each product with quantised weights take activations as they are, in float32.

    A MatMulInteger and the quantisation before it become the product of the same weights, MatMulNBits keeps its
    activations, and activations that are quantised and back are left alone.
    """
    made = {name: node for node in graph.node for name in node.output}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            values, scale, _ = node.output
            one = numpy_helper.from_array(np.array(1, np.float32))
            nodes.append(helper.make_node("Identity", [node.input[0]], [values]))
            nodes.append(helper.make_node("Constant", [], [scale], value=one))
        elif node.op_type == "MatMulInteger":
            nodes += _float_matmul(node)
        elif node.op_type == "DequantizeLinear" and (source := made.get(node.input[0])) is not None:
            plain = source.op_type == "QuantizeLinear"
            nodes.append(helper.make_node("Identity", [source.input[0]], [node.output[0]]) if plain else node)
        else:
            if _accuracy_level(node):
                next(item for item in node.attribute if item.name == "accuracy_level").i = IN_FLOAT32
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _float_matmul(node: Any) -> list[Any]:
    """A MatMulInteger as the float32 product of activations and the same weights."""
    out = node.output[0]
    weights = f"{out}/weights"
    nodes = [helper.make_node("Cast", [node.input[1]], [weights], to=TensorProto.FLOAT)]
    if _has_input(node, 3):
        nodes.append(helper.make_node("Cast", [node.input[3]], [f"{out}/zero"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Sub", [weights, f"{out}/zero"], [f"{out}/centred"]))
        weights = f"{out}/centred"
    return [*nodes, helper.make_node("MatMul", [node.input[0], weights], [out])]
