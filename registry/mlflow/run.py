"""An MLflow run that is going on: its parameters, metrics, tags and artifacts."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.registry.mlflow.client import RetryingMlflowClient


class Run:
    """An MLflow run that is going on; `limbeck.registry.mlflow.store.Store.run` begins and ends it."""

    def __init__(self, client: RetryingMlflowClient, run_id: str) -> None:
        self._client = client
        self.id = run_id

    def log_metrics(self, values: Mapping[str, float], step: int = 0, *, model_id: str | None = None) -> None:
        """Log numbers at a step; of the LoggedModel `model_id` where given."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(mlflow_key(k), float(v), now, step, model_id=model_id) for k, v in values.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.id, metrics=metrics[start : start + 1000])

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log the parameters of the run, as text."""
        from mlflow.entities import Param

        params = [Param(mlflow_key(name), str(value)[:6000]) for name, value in values.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(self.id, params=params[start : start + 100])

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        for name, value in values.items():
            self._client.set_tag(self.id, mlflow_key(name), str(value))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or a folder's content, with the run (below `folder` where given)."""
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(self.id, str(path), folder)


def mlflow_key(name: str) -> str:
    """A name that MLflow takes for a metric, parameter or tag."""
    return re.sub(r"[^\w./ :-]", "_", name)[:250]
