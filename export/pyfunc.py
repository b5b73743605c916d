"""An ONNX artifact as MLflow's pyfunc model: `mlflow models serve`, `mlflow.pyfunc.load_model`, a Spark UDF.

MLflow finds this module by the artifact's `MLmodel`; Limbeck has to be installed where it runs, torch need not be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.errors import BadInput

# What a caller may set, as in `Sampling`: MLflow's type and the default. An array's default is a list.
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
}
BATCH_ROWS = 16  # rows that are decoded at once


def _load_pyfunc(path: str) -> CompletionModel:
    """What MLflow calls with the artifact's folder. Raises DamagedArtifact where its files are not those it had."""
    return CompletionModel(Runtime.load(Path(path)))


class CompletionModel:
    """Completes a column of prompts."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def predict(self, table: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """The prompts' completions, as a column `text` beside the same index.

        Args:
            table: a column `prompt` of texts; a list of texts in it, which MLflow makes of {"prompt": [...]}, is as
                many rows.
            params: as in `PARAMS`. With a `seed`, a row's draws depend on its place.

        Raises BadInput: a prompt that is no text or leaves no room in the context, or a setting out of range.
        """
        settings = {name: default for name, (_, default) in PARAMS.items()} | (params or {})
        seed = settings.pop("seed")
        table = table.explode("prompt")
        prompts = list(table["prompt"])
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise BadInput(f"row {row} of the column prompt is no text but {prompt!r}")
        texts: list[str] = []
        for start in range(0, len(prompts), BATCH_ROWS):
            own = None if seed is None else int(seed) + start  # else each group would draw alike
            some = prompts[start : start + BATCH_ROWS]
            texts += [done.text for done in self.runtime.generate(some, seed=own, **settings)]
        return pd.DataFrame({"text": texts}, index=table.index)
