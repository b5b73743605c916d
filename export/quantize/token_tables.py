"""The tables of tokens in a graph: the embedding, which a tied head may read too, and others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from limbeck.export.graph.external_data import load_graph


def load_with_gemm_as_matmul(graph: Path) -> Any:
    """Load a graph, convert each Gemm to MatMul and Add, and drop the inferred types of its tensors.

    Its large weights stay on disk (`limbeck.export.graph.external_data`), unless there is a Gemm.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = load_graph(graph)
    if any(node.op_type == "Gemm" for node in model.graph.node):
        wrapper = ONNXModel(onnx.load(graph))
        wrapper.replace_gemm_with_matmul()
        model = wrapper.model
    del model.graph.value_info[:]
    return model


def find_token_embedding(graph: Any) -> str | None:
    """Name the float table that `input_ids` indexes; None if more than the lookup and a tied head reads it."""
    floats = {item.name for item in graph.initializer if item.data_type == 1 and len(item.dims) == 2}
    from_ids = {"input_ids"}  # and tensors made from it: some graphs pass the ids through a Reshape
    name = None
    for item in graph.node:  # in topological order
        if item.op_type in ("Reshape", "Cast", "Identity") and item.input[0] in from_ids:
            from_ids.update(item.output)
        if item.op_type == "Gather" and item.input[0] in floats and item.input[1] in from_ids:
            name = item.input[0]
            break
    readers = [item for item in graph.node if name in item.input]
    transposed = [item.output[0] for item in readers if item.op_type in ("Transpose", "Reshape")]
    heads = [item for item in graph.node for value in transposed if value in item.input]
    only_lookups = all(item.op_type in ("Gather", "Transpose", "Reshape") for item in readers)
    only_products = all(item.op_type in ("MatMul", "FusedMatMul") for item in heads)
    return name if only_lookups and only_products else None


def find_token_tables(graph: Any) -> list[str]:
    """Name the float tables that `input_ids` indexes: the token embedding, and others that nothing else reads."""
    floats = {item.name for item in graph.initializer if item.data_type == 1 and len(item.dims) == 2}
    readers = Counter(name for item in graph.node for name in item.input)
    found = [find_token_embedding(graph)]
    for item in graph.node:
        if item.op_type == "Gather" and item.input[0] in floats and item.input[1] == "input_ids":
            found += [item.input[0]] if readers[item.input[0]] == 1 else []
    return list(dict.fromkeys(name for name in found if name))
