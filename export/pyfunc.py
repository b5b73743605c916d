"""MLflow's loader of an ONNX artifact: for `mlflow models serve`, `mlflow.pyfunc.load_model` and Spark UDFs.

An artifact's `MLmodel` names this module (see limbeck.export.artifact.interop). It needs Limbeck, but no torch.
To run an artifact without MLflow, use limbeck.runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.errors import BadInput

# Parameters that a caller may set, as in `Runtime.generate`: name -> (MLflow's type, default). A list default means an
# array.
PARAMS: dict[str, tuple[str, Any]] = {
    "max_new_tokens": ("long", 64),
    "temperature": ("double", 0.0),
    "top_k": ("long", None),
    "top_p": ("double", None),
    "min_p": ("double", None),
    "repetition_penalty": ("double", 1.0),
    "presence_penalty": ("double", 0.0),
    "frequency_penalty": ("double", 0.0),
    "seed": ("long", None),
    "stop": ("string", []),
    "parse_special": ("boolean", False),
}
BATCH_ROWS = 16  # rows decoded together


def _load_pyfunc(path: str) -> CompletionModel:
    """Load the artifact in the folder `path`; MLflow calls this. Raises DamagedArtifact if its files were changed."""
    return CompletionModel(Runtime.load(Path(path)))


class CompletionModel:
    """Completes a column of prompts."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def predict(self, table: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Complete each prompt. Returns a column `text` with the index of `table`.

        Args:
            table: a column `prompt` of texts. A list of texts in a cell, as MLflow makes from {"prompt": [...]}, counts
                as that many rows.
            params: as in `PARAMS`. With a `seed`, a row's sample depends on its position.

        Raises BadInput if a prompt is not a text or leaves no room in the context, or a parameter is out of range.
        """
        settings = {name: default for name, (_, default) in PARAMS.items()} | (params or {})
        seed = settings.pop("seed")
        table = table.explode("prompt")
        prompts = list(table["prompt"])
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise BadInput(f"row {row} of the column prompt is not a text: {prompt!r}")
        texts: list[str] = []
        for start in range(0, len(prompts), BATCH_ROWS):
            batch_seed = None if seed is None else int(seed) + start  # or each batch would repeat the same samples
            batch = prompts[start : start + BATCH_ROWS]
            texts += [done.text for done in self.runtime.generate(batch, seed=batch_seed, **settings)]
        return pd.DataFrame({"text": texts}, index=table.index)
