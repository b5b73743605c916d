"""The file MLmodel: with it MLflow loads an artifact as a pyfunc model, serves it and runs it in Spark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MLMODEL_FILE = "MLmodel"


def write_mlmodel(folder: Path, loader: str, params: Mapping[str, tuple[str, Any]]) -> None:
    """Write the file into an artifact that completes prompts: input column `prompt`, output column `text`.

    It holds neither time nor machine, so the same artifact always has the same digest.

    Args:
        loader: the module whose `_load_pyfunc(path)` returns the predictor.
        params: name -> (MLflow's type, default) of the parameters of a call; a default that is a list means an array.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    specs = [
        ParamSpec(name, kind, default, shape=(-1,) if isinstance(default, list) else None)
        for name, (kind, default) in params.items()
    ]
    model = Model(
        flavors={"python_function": {"loader_module": loader}},
        signature=ModelSignature(
            inputs=Schema([ColSpec("string", "prompt")]),
            outputs=Schema([ColSpec("string", "text")]),
            params=ParamSchema(specs),
        ),
        model_uuid=None,
        mlflow_version=None,
        utc_time_created="",
    )
    del model.utc_time_created
    (folder / MLMODEL_FILE).write_text(model.to_yaml())
