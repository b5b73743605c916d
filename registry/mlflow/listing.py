"""All versions with their tags in one query: a list of 10,000 versions needs neither a query for each nor MLflow.

A SQLite store is read directly, since importing MLflow takes longer than reading 10,000 versions: read-only, and only
if the database has the exact schema that the queries are written for. Any other store is read through MLflow.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.registry.mlflow.client import NotFound, RetryingMlflowClient, sqlite_file
from limbeck.registry.mlflow.filters import Condition, to_filter_string
from limbeck.registry.mlflow.layout import EXPERIMENT
from limbeck.registry.mlflow.versions import MODEL_ID_TAG

SCHEMA = "dc11669786a5"  # the alembic revision of MLflow 3.17's database
VERSIONS = """
SELECT v.name, v.version, v.source, v.creation_time, v.run_id, json_group_object(t.key, t.value)
FROM model_versions v JOIN model_version_tags t USING (workspace, name, version)
WHERE v.workspace = 'default' AND v.current_stage != 'Deleted_Internal' AND (:name IS NULL OR v.name = :name)
GROUP BY v.name, v.version ORDER BY v.name, v.version
"""
METRIC = """
SELECT m.model_id, m.metric_value FROM logged_model_metrics m JOIN logged_models l USING (model_id)
WHERE m.metric_name = :metric AND l.lifecycle_stage != 'deleted' ORDER BY m.metric_timestamp_ms, m.metric_step
"""
ALIASES = "SELECT name, version, alias FROM registered_model_aliases WHERE workspace = 'default' ORDER BY alias"


class ListedVersion(NamedTuple):
    """A model version as MLflow keeps it."""

    name: str
    version: int
    source: str
    creation_timestamp: int  # milliseconds
    run_id: str | None
    tags: dict[str, str]
    aliases: tuple[str, ...]  # sorted
    metrics: dict[str, float] = {}  # the newest value of each metric that was asked for


def list_versions(
    client: RetryingMlflowClient,
    tracking_uri: str,
    name: str | None = None,
    conditions: Sequence[Condition] = (),
    metrics: Iterable[str] = (),
) -> list[ListedVersion]:
    """The versions that have tags, of `name` or of all models, by name and oldest first.

    Args:
        conditions: all of them hold for each version returned.
        metrics: to return besides those that the conditions are about.
    """
    wanted = {*metrics, *(condition.key for condition in conditions if condition.kind == "metric")}
    file = sqlite_file(tracking_uri)
    found = list_from_sqlite(file, name, wanted) if file else None
    if found is None:
        found = list_from_mlflow(client, name, conditions, wanted)
    return [each for each in found if all(condition.matches(each) for condition in conditions)]


def list_from_sqlite(file: Path, name: str | None, metrics: Iterable[str] = ()) -> list[ListedVersion] | None:
    """All versions; None if the database does not have SCHEMA."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=20)) as database:
            database.execute("BEGIN")  # all queries see one state
            if database.execute("SELECT version_num FROM alembic_version").fetchall() != [(SCHEMA,)]:
                return None
            aliases: dict[tuple[str, int], list[str]] = defaultdict(list)
            for model, version, alias in database.execute(ALIASES):
                aliases[model, version].append(alias)
            values = {metric: dict(database.execute(METRIC, {"metric": metric})) for metric in metrics}
            return [
                _with_metrics(_from_row(row, aliases), values) for row in database.execute(VERSIONS, {"name": name})
            ]
    except sqlite3.Error:  # MLflow explains it
        return None


def _from_row(row: tuple[Any, ...], aliases: Mapping[tuple[str, int], Sequence[str]]) -> ListedVersion:
    """A row of VERSIONS."""
    name, version, source, created, run_id, tags = row
    own_aliases = tuple(aliases[name, version])
    return ListedVersion(name, version, source, created, run_id or None, json.loads(tags), own_aliases)


def list_from_mlflow(
    client: RetryingMlflowClient, name: str | None, conditions: Sequence[Condition] = (), metrics: Iterable[str] = ()
) -> list[ListedVersion]:
    """The versions that MLflow finds. It checks those conditions only that its language can express."""
    expressible = [condition for condition in conditions if condition.is_expressible]
    of_name = [Condition("attribute", "name", "=", name)] if name else []
    of_version = [condition for condition in expressible if condition.kind != "metric"]
    found = _pages(
        client.search_model_versions,
        to_filter_string([*of_name, *of_version]),
        order_by=["name ASC", "version_number ASC"],
    )
    versions = [version for version in found if version.tags]
    values = _metric_values(client, [condition for condition in expressible if condition.kind == "metric"], metrics)
    # MLflow's search returns no aliases.
    aliases = {model: read_aliases(client, model) for model in {version.name for version in versions}}
    return [_with_metrics(_from_mlflow(version, aliases[version.name]), values) for version in versions]


def _from_mlflow(found: Any, aliases: Mapping[str, int]) -> ListedVersion:
    """A model version of MLflow, given the aliases of its model."""
    number = int(found.version)
    own_aliases = tuple(sorted(alias for alias, target in aliases.items() if target == number))
    return ListedVersion(
        found.name,
        number,
        found.source,
        found.creation_timestamp,
        found.run_id or None,
        dict(found.tags),
        own_aliases,
    )


def _metric_values(
    client: RetryingMlflowClient, conditions: Sequence[Condition], metrics: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Metric -> id of a LoggedModel -> its newest value; only of LoggedModels for which MLflow finds the conditions."""
    values: dict[str, dict[str, float]] = {metric: {} for metric in metrics}
    experiment = client.get_experiment_by_name(EXPERIMENT) if values else None
    if experiment is None:
        return values

    def search(filter_string: str, **page: Any) -> Any:
        return client.search_logged_models([experiment.experiment_id], filter_string, **page)

    for model in _pages(search, to_filter_string(conditions)):
        for metric in sorted(model.metrics or (), key=lambda metric: (metric.timestamp, metric.step)):
            if metric.key in values:
                values[metric.key][model.model_id] = metric.value
    return values


def _pages(search: Callable[..., Any], filter_string: str, **options: Any) -> Iterator[Any]:
    """All results of a paged search of MLflow."""
    token = None
    while True:
        page = search(filter_string, max_results=1000, page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


def _with_metrics(version: ListedVersion, values: Mapping[str, Mapping[str, float]]) -> ListedVersion:
    """The version with its own metrics."""
    if not values:
        return version
    model = version.tags.get(MODEL_ID_TAG, "")
    return version._replace(metrics={name: by_model[model] for name, by_model in values.items() if model in by_model})


def read_aliases(client: RetryingMlflowClient, name: str) -> dict[str, int]:
    """Alias -> version number of a registered model; empty if there is no such model."""
    try:
        aliases = client.get_registered_model(name).aliases
    except NotFound:
        return {}
    return {alias: int(number) for alias, number in aliases.items()}
