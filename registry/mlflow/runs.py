"""MLflow runs: how they start and end, and what is logged in them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow import layout
from limbeck.registry.mlflow.client import AlreadyExists, NotFound, RetryingMlflowClient, artifact_location
from limbeck.registry.mlflow.versions import TAG_PREFIX
from limbeck.registry.records import TrainingCost, Version

EXPERIMENT = layout.EXPERIMENT
TRAINING_COST_TAG = TAG_PREFIX + "training_cost"  # a tag of the run that made a version
SWEEP_TAG = TAG_PREFIX + "sweep"  # digest of all that a sweep makes
PARENT_TAG = "mlflow.parentRunId"
METRICS_PER_CALL = 1000  # MLflow refuses more
LONGEST_PARAM = 6000  # characters; MLflow refuses more


class Run:
    """An MLflow run that has not ended; `Runs.start` starts and ends it."""

    def __init__(self, client: RetryingMlflowClient, run_id: str) -> None:
        self._client = client
        self.id = run_id

    def log_metrics(self, values: Mapping[str, float], step: int = 0, *, model_id: str | None = None) -> None:
        """Log numbers at a step; also of the LoggedModel `model_id` if given."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(mlflow_key(k), float(v), now, step, model_id=model_id) for k, v in values.items()]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self.id, metrics=metrics[start : start + METRICS_PER_CALL])

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log the parameters of the run, as text; texts of more than 6,000 characters are cut."""
        params = {mlflow_key(name): str(value)[:LONGEST_PARAM] for name, value in values.items()}
        self._client.log_params(self.id, params)

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run, as text."""
        for name, value in values.items():
            self._client.set_tag(self.id, mlflow_key(name), str(value))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or the content of a folder, with the run (below `folder` if given)."""
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(self.id, str(path), folder)


class Runs:
    """The runs of a tracking store, all in the experiment `limbeck`."""

    def __init__(self, client: RetryingMlflowClient, tracking_uri: str) -> None:
        self._client = client
        self._tracking_uri = tracking_uri
        self._experiment_id: str | None = None

    @contextmanager
    def start(
        self,
        name: str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        parent: str | None = None,
    ) -> Iterator[Run]:
        """Start an MLflow run: FINISHED when the block ends, KILLED by Ctrl-C, FAILED by any other error.

        Args:
            parent: the id of the run that it is shown below.
        """
        all_tags = {mlflow_key(key): str(value) for key, value in (tags or {}).items()}
        if parent:
            all_tags[PARENT_TAG] = parent
        created = self._client.create_run(self.experiment_id(), run_name=name, tags=all_tags)
        with self._ended(Run(self._client, created.info.run_id)) as run:
            run.log_params(params or {})
            yield run

    @contextmanager
    def start_or_resume_sweep(self, name: str, digest: str) -> Iterator[Run]:
        """Start the run that the runs of one sweep are shown below, or resume it if it did not finish.

        Args:
            digest: of all that the sweep makes; it identifies the sweep.
        """
        experiment = self.experiment_id()
        unfinished = f"tags.`{SWEEP_TAG}` = '{digest}' and attributes.status != 'FINISHED'"
        if found := self._client.search_runs([experiment], unfinished, max_results=1):
            run_id = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
        else:
            run_id = self._client.create_run(experiment, run_name=name, tags={SWEEP_TAG: digest}).info.run_id
        with self._ended(Run(self._client, run_id)) as run:
            yield run

    @contextmanager
    def _ended(self, run: Run) -> Iterator[Run]:
        """Set the status of a run at the end of the block."""
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self._client.set_terminated(run.id, status=status)

    def training_cost(self, version: Version) -> TrainingCost | None:
        """The cost of training a version, an ONNX variant has that of its student.

        None if it was not recorded, or if the run that recorded it was deleted for good.
        """
        if version.run_id is None:
            return None
        try:
            recorded = self._client.get_run(version.run_id).data.tags.get(TRAINING_COST_TAG)
        except NotFound:
            return None
        return TrainingCost.model_validate_json(recorded) if recorded else None

    def local_folder(self, run_id: str) -> Path | None:
        """Where the files of a run are in a workspace, without asking MLflow; None for another store."""
        location = artifact_location(self._tracking_uri)
        return Path(location) / run_id / "artifacts" if location else None

    def lifecycle(self, run_id: str) -> str | None:
        """`active` or `deleted`; None for a run that was deleted for good."""
        try:
            return str(self._client.get_run(run_id).info.lifecycle_stage)
        except NotFound:
            return None

    def lifecycles(self) -> dict[str, str]:
        """Run id -> `active` or `deleted`, of all runs; one that was deleted for good is not there."""
        from mlflow.entities import ViewType

        ids = [each.experiment_id for each in self.experiments()]
        found: dict[str, str] = {}
        token = None
        while ids:
            page = self._client.search_runs(ids, "", ViewType.ALL, max_results=1000, page_token=token)
            found |= {run.info.run_id: run.info.lifecycle_stage for run in page}
            token = page.token
            if not token:
                break
        return found

    def experiments(self) -> list[Any]:
        """All experiments of MLflow, the deleted ones too."""
        from mlflow.entities import ViewType

        return list(self._client.search_experiments(ViewType.ALL, max_results=1000))

    def experiment_id(self) -> str:
        """The id of the experiment `limbeck`, created if it is missing.

        Raises BadInput if the experiment was deleted.
        """
        if self._experiment_id is None:
            self._experiment_id = self._find_or_create_experiment()
        return self._experiment_id

    def _find_or_create_experiment(self) -> str:
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            location = artifact_location(self._tracking_uri)
            try:
                tags = layout.CURRENT_MARK | layout.place_tag(location)
                return str(self._client.create_experiment(EXPERIMENT, artifact_location=location, tags=tags))
            except AlreadyExists:  # another process was faster
                experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment.lifecycle_stage != "active":
            raise BadInput(
                f"the MLflow experiment {EXPERIMENT!r} of {self._tracking_uri} is deleted",
                fix=f"mlflow experiments restore --experiment-id {experiment.experiment_id}",
            )
        layout.write_mark(self._client, experiment)
        return str(experiment.experiment_id)


def mlflow_key(name: str) -> str:
    """A name as MLflow allows it for a metric, parameter or tag."""
    return re.sub(r"[^\w./ :-]", "_", name)[:250]
