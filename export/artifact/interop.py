"""Describe an artifact to other programs: tensor names, the tokenizer's class, genai_config.json, MLflow's MLmodel."""

from __future__ import annotations

import json
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

    The tokenizer's class gets a name that transformers 4 knows too, since optimum runs the artifact with that. A bare
    onnxruntime session needs no extra files.

    Args:
        graph_kind: "fused" or "optimum".

    Returns:
        `inputs` and `outputs` for the manifest: name -> type and shape, such as "int64[batch_size, sequence_length]".
    """
    signature = graph_signature(folder / "model.onnx")
    if graph_kind == "fused":
        genai.write_genai_config(folder, signature)
    _name_tokenizer_class(folder / "tokenizer_config.json")
    mlmodel.write_mlmodel(folder, MLFLOW_LOADER, PARAMS)
    return {key: {item["name"]: _format_tensor(item) for item in items} for key, items in signature.items()}


def _name_tokenizer_class(file: Path) -> None:
    """Replace the name that transformers 5 gave to the class PreTrainedTokenizerFast; it knows both names."""
    config = json.loads(file.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        file.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def _format_tensor(item: dict[str, Any]) -> str:
    return f"{item['type']}[{', '.join(map(str, item['shape']))}]"
