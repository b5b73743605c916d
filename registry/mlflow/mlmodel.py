"""MLmodel: what lets MLflow load an artifact as a pyfunc model, serve it and run it in Spark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MLMODEL_FILE = "MLmodel"


def write_mlmodel(folder: Path, loader: str, params: Mapping[str, tuple[str, Any]]) -> None:
    """Write the file into an artifact that completes prompts: a column `prompt` in, a column `text` out.

    It says nothing of when and where it was made, so that the same artifact has the same digest each time.

    Args:
        loader: the module whose `_load_pyfunc(path)` gives what predicts.
        params: name -> (MLflow's type, default) of what a caller may set besides; a list is an array of the type.
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
