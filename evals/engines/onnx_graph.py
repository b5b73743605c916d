"""Changes an exported ONNX graph in memory, so that it scores trees of tokens and computes only the logits in use.

Two inputs are added. `tree_mask` is added to each layer's attention mask (in a fused graph to the attention bias of
each GroupQueryAttention); zero changes nothing. `logit_positions` selects hidden states just before the language-model
head. A graph whose form does not allow an input is left without it.
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

TREE_MASK, LOGIT_POSITIONS = "tree_mask", "logit_positions"
ELEMENTWISE = {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Sub", "Tanh"}  # what may follow the head
HEAD_OPERATORS = {"FusedMatMul", "Gemm", "MatMul", "MatMulNBits"}
MAX_TREE_TOKENS = isqrt(MAX_ATTENTION_PAIRS)  # of a row that shares prefixes
ATTENTION, ATTENTION_BIAS_INPUT = "GroupQueryAttention", 10  # the operator; the index of its input attention_bias
COLUMNS = "columns"  # what a fused graph rotates by, as limbeck.export.graph.blocks names it
IN_FLOAT32, IN_INT8 = 1, 4  # MatMulNBits' accuracy_level: the type that activations are rounded to, block by block


def open_session(folder: Path, float_products: bool = False) -> tuple[ort.InferenceSession, bool]:
    """A session of the artifact in `folder`, with the two inputs if its graph allows them.

    Args:
        float_products: multiply quantised weights in float32, with activations that are not quantised.

    Returns:
        The session, and whether it quantises activations while it runs. If so, a number depends slightly on the rest of
        the batch, and on the last bit of the numbers before it.
    """
    model = onnx.load(folder / GRAPH, load_external_data=False)
    graph = model.graph
    del graph.value_info[:]  # inferred again when the graph is loaded
    gather_before_head(graph)
    rotate_by_position_ids(graph)
    add_tree_mask(graph)
    remove_nan_guards(graph)
    extend_rotary_tables(graph)
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # every batch has another shape
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # torch's threads work between two runs, and spinning threads would slow them
    # The folder of external weight files.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if float_products:
        multiply_in_float(graph)
        options.graph_optimization_level = (
            ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        )  # no copy of the weights in float32
    quantizes = any(_accuracy_level(node) == IN_INT8 for node in graph.node)
    data = model.SerializeToString()
    del model, graph
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]), quantizes


def _accuracy_level(node: Any) -> int:
    """The accuracy level of a MatMulNBits, 0 for other operators; 0 leaves the choice to onnxruntime."""
    levels = (item.i for item in node.attribute if item.name == "accuracy_level")
    return int(next(levels, 0)) if node.op_type == "MatMulNBits" else 0


def gather_before_head(graph: Any) -> None:
    """Give the head only the (1, M, H) hidden states at `logit_positions`."""
    producers = {name: node for node in graph.node for name in node.output}
    search = [producers["logits"]]
    while search and search[-1].op_type not in HEAD_OPERATORS:
        node = search.pop()
        if node.op_type in ELEMENTWISE:
            search += [producers[name] for name in node.input if name in producers]
    if not search:
        return
    head = search[-1]
    hidden = head.input[0]
    rows, selected, axis = (f"{hidden}/{name}" for name in ("rows", "selected", "axis"))
    index = next(index for index, node in enumerate(graph.node) if node is head)
    for node in (
        helper.make_node("Unsqueeze", [f"{selected}/rows", axis], [selected], name=selected),
        helper.make_node("Gather", [rows, LOGIT_POSITIONS], [f"{selected}/rows"], name=f"{selected}/rows"),
        helper.make_node("Flatten", [hidden], [rows], name=rows, axis=2),
    ):
        graph.node.insert(index, node)
    head.input[0] = selected
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), axis))
    graph.input.append(helper.make_tensor_value_info(LOGIT_POSITIONS, TensorProto.INT64, ["selected"]))
    logits = next(output for output in graph.output if output.name == "logits")
    for dimension, name in zip(logits.type.tensor_type.shape.dim, ("one", "selected"), strict=False):
        dimension.dim_param = name


def rotate_by_position_ids(graph: Any) -> None:
    """Rotate queries and keys by `position_ids`: a fused graph takes the tokens' columns in the row.

    In a tree, tokens of several branches have the same position. A GroupQueryAttention that rotates gets queries and
    keys that are rotated.
    """
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "RotaryEmbedding" and node.input[1] == COLUMNS:
            node.input[1] = "position_ids"
        attributes = {item.name: item for item in node.attribute} if node.op_type == ATTENTION else {}
        if "do_rotary" in attributes and attributes["do_rotary"].i:
            attributes["do_rotary"].i = 0
            nodes += _rotated_outside(graph, node, attributes)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _rotated_outside(graph: Any, attention: Any, attributes: dict[str, Any]) -> list[Any]:
    """The nodes that split and rotate the packed queries, keys and values of `attention`, which then reads them."""
    name, tables = attention.output[0], list(attention.input[7:9])
    heads = {"query": attributes["num_heads"].i, "key": attributes["kv_num_heads"].i}
    cache = next(item for item in graph.input if item.name == attention.input[3])
    size = cache.type.tensor_type.shape.dim[3].dim_value
    sizes = np.array([size * count for count in (heads["query"], heads["key"], heads["key"])])
    graph.initializer.append(numpy_helper.from_array(sizes, f"{name}/sizes"))
    parts = [f"{name}/query", f"{name}/key", f"{name}/value"]
    nodes = [helper.make_node("Split", [attention.input[0], f"{name}/sizes"], parts, name=f"{name}/split", axis=-1)]
    width = 2 * next(item.dims[1] for item in graph.initializer if item.name == tables[0])
    options = {"domain": "com.microsoft", "rotary_embedding_dim": width}
    options["interleaved"] = attributes["rotary_interleaved"].i
    for index, (part, count) in enumerate(heads.items()):
        out = f"{name}/{part}/rotated"
        inputs = [parts[index], "position_ids", *tables]
        nodes.append(helper.make_node("RotaryEmbedding", inputs, [out], name=out, num_heads=count, **options))
        attention.input[index] = out
    attention.input[2], attention.input[7], attention.input[8] = parts[2], "", ""
    return nodes


def add_tree_mask(graph: Any) -> None:
    """Add `tree_mask`, (B or 1, 1, T or 1, past + T or 1) float32, to every mask that is added to attention scores."""
    past = next((item for item in graph.input if item.name.startswith("past_key_values.")), None)
    score_type = past.type.tensor_type.elem_type if past is not None else TensorProto.FLOAT
    tree = TREE_MASK if score_type == TensorProto.FLOAT else f"{TREE_MASK}/cast"
    sums: dict[str, str] = {}  # mask -> its sum with the tree mask; fused graphs have one mask for all layers
    for node, index in [*_masks_of_scores(graph), *_attention_biases(graph)]:
        mask = node.input[index]
        if mask not in sums:
            sums[mask] = total = f"{node.output[0]}/mask"
            before = next(number for number, other in enumerate(graph.node) if other is node)
            graph.node.insert(before, helper.make_node("Add", [mask, tree], [total], name=total))
        node.input[index] = sums[mask]
    if sums:
        if tree != TREE_MASK:
            graph.node.insert(0, helper.make_node("Cast", [TREE_MASK], [tree], name=tree, to=score_type))
        shape: list[str | int | None] = ["tree_batch", 1, "tree_length", "tree_total"]
        graph.input.append(helper.make_tensor_value_info(TREE_MASK, TensorProto.FLOAT, shape))


def _masks_of_scores(graph: Any) -> list[tuple[Any, int]]:
    """(Add node before a Softmax, index of its input that is the mask).

    Scores depend on the tokens or the cache; a mask depends on lengths only.
    """
    tables = {item.name for item in graph.initializer if len(item.dims) == 2}
    from_tokens = {item.name for item in graph.input if item.name.startswith("past_key_values.")}
    producers: dict[str, Any] = {}
    masks = []
    for node in graph.node:  # in topological order
        looked_up = node.op_type == "Gather" and node.input[0] in tables
        if looked_up or (node.op_type != "Shape" and not from_tokens.isdisjoint(node.input)):
            from_tokens.update(node.output)
        producers.update((name, node) for name in node.output)
        scores = producers.get(node.input[0]) if node.op_type == "Softmax" else None
        if scores is not None and scores.op_type == "Add":
            candidates = [index for index, name in enumerate(scores.input) if name not in from_tokens]
            if len(candidates) == 1:
                masks.append((scores, candidates[0]))
    return masks


def _attention_biases(graph: Any) -> list[tuple[Any, int]]:
    """(fused attention node, index of its attention bias) of each that has one."""
    nodes = [node for node in graph.node if node.op_type == ATTENTION]
    return [(node, ATTENTION_BIAS_INPUT) for node in nodes if _has_input(node, ATTENTION_BIAS_INPUT)]


def _has_input(node: Any, index: int) -> bool:
    return len(node.input) > index and bool(node.input[index])


def remove_nan_guards(graph: Any) -> None:
    """Remove Where(IsNaN(x), 0, x) after each Softmax x, which takes an eighth of the time.

    It is there for tokens that attend to nothing. Here every token attends to itself, padding included.
    """
    producers = {name: node for node in graph.node for name in node.output}
    unguarded: dict[str, str] = {}  # output of a guard -> output of its Softmax
    guards = []
    for node in graph.node:
        test = producers.get(node.input[0]) if node.op_type == "Where" else None
        if test is None or test.op_type != "IsNaN" or test.input[0] != node.input[2]:
            continue
        if producers[node.input[2]].op_type == "Softmax":
            unguarded[node.output[0]] = node.input[2]
            guards += [node, test]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in unguarded:
                node.input[index] = unguarded[name]
    for node in guards:
        graph.node.remove(node)


def extend_rotary_tables(graph: Any) -> None:
    """Let RotaryEmbedding accept rows longer than the context, for which its tables need more positions.

    No single text is longer than the context, so the added zeros are never looked up.
    """
    tables = {item.name: item for item in graph.initializer}
    extended: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "RotaryEmbedding"]:
        for index in (2, 3):
            name = node.input[index]
            if name in tables and tables[name].dims[0] < MAX_TREE_TOKENS and name not in extended:
                extended[name] = f"{name}/extended"
                positions, width = tables[name].dims
                dtype = helper.tensor_dtype_to_np_dtype(tables[name].data_type)
                zeros = np.zeros((MAX_TREE_TOKENS - positions, width), dtype)
                graph.initializer.append(numpy_helper.from_array(zeros, f"{name}/zeros"))
                concat = helper.make_node(
                    "Concat", [name, f"{name}/zeros"], [extended[name]], name=extended[name], axis=0
                )
                graph.node.insert(0, concat)
            node.input[index] = extended.get(name, name)


def multiply_in_float(graph: Any) -> None:
    """Let every product with quantised weights use activations in float32 that are not quantised."""
    for node in graph.node:
        if _accuracy_level(node):
            next(item for item in node.attribute if item.name == "accuracy_level").i = IN_FLOAT32
