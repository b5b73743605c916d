"""What lets programs other than Limbeck read an artifact: tensor names, genai_config.json, MLflow's MLmodel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.export import pyfunc
from limbeck.export.artifact import genai
from limbeck.export.graph.signature import graph_signature
from limbeck.registry.mlflow import mlmodel


def write_interop_files(folder: Path, kind: str) -> dict[str, dict[str, str]]:
    """Write what they read into the artifact in `folder`; gives what its manifest tells of the graph.

    That is its `inputs` and `outputs`, name to type and shape: "int64[batch_size, sequence_length]".

    onnxruntime-genai runs fused graphs; optimum and a bare onnxruntime session need nothing besides.

    Args:
        kind: of graph: "fused" or "optimum".
    """
    tensors = graph_signature(folder / "model.onnx")
    if kind == "fused":
        genai.write_genai_config(folder, tensors)
    mlmodel.write_mlmodel(folder, pyfunc.__name__, pyfunc.PARAMS)
    return {key: {item["name"]: _format_tensor(item) for item in items} for key, items in tensors.items()}


def _format_tensor(item: dict[str, Any]) -> str:
    return f"{item['type']}[{', '.join(map(str, item['shape']))}]"
