"""Describe an artifact to programs other than Limbeck: tensor names, genai_config.json, MLflow's MLmodel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.export.artifact import genai
from limbeck.export.graph.signature import graph_signature
from limbeck.export.pyfunc import PARAMS
from limbeck.registry.mlflow import mlmodel

# The module that MLflow imports to load an artifact. Registered artifacts name it, so it must not move.
MLFLOW_LOADER = "limbeck.export.pyfunc"


def write_interop_files(folder: Path, graph_kind: str) -> dict[str, dict[str, str]]:
    """Write MLmodel, and genai_config.json if onnxruntime-genai can run the graph, into the artifact in `folder`.

    optimum and a bare onnxruntime session need no extra files.

    Args:
        graph_kind: "fused" or "optimum".

    Returns:
        `inputs` and `outputs` for the manifest: name -> type and shape, such as "int64[batch_size, sequence_length]".
    """
    signature = graph_signature(folder / "model.onnx")
    if graph_kind == "fused":
        genai.write_genai_config(folder, signature)
    mlmodel.write_mlmodel(folder, MLFLOW_LOADER, PARAMS)
    return {key: {item["name"]: _format_tensor(item) for item in items} for key, items in signature.items()}


def _format_tensor(item: dict[str, Any]) -> str:
    return f"{item['type']}[{', '.join(map(str, item['shape']))}]"
