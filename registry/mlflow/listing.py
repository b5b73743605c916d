"""The versions of models with their tags, all at once: a list of 10,000 needs neither a query for each nor MLflow.

A SQLite store is read directly, since importing MLflow takes longer than reading 10,000 versions: read only, and
only where the database has the very schema that the query is written for. Any other store is asked through MLflow.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from limbeck.registry.mlflow.client import NotFound, RetryingMlflowClient, sqlite_file
from limbeck.registry.mlflow.filters import Condition, to_filter_string

SCHEMA = "dc11669786a5"  # as MLflow 3.17 marks its database (alembic)
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
MODEL_ID = "limbeck.model_id"  # the tag that names a version's LoggedModel, which has its metrics
EXPERIMENT = "limbeck"  # of the LoggedModels
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
    metrics: dict[str, float] = {}  # those that were asked for: the newest value of each


def list_versions(
    client: RetryingMlflowClient,
    tracking_uri: str,
    name: str | None = None,
    conditions: Sequence[Condition] = (),
    metrics: Iterable[str] = (),
) -> list[ListedVersion]:
    """The versions that have tags, of `name` or of all models, by name and oldest first.

    Args:
        conditions: that all hold of them.
        metrics: to give besides those that the conditions are about.
    """
    wanted = {*metrics, *(condition.key for condition in conditions if condition.kind == "metric")}
    file = sqlite_file(tracking_uri)
    found = _from_sqlite(file, name, wanted) if file else None
    if found is None:
        found = _from_mlflow(client, name, conditions, wanted)
    return [each for each in found if all(condition.matches(each) for condition in conditions)]


def _from_sqlite(file: Path, name: str | None, metrics: Iterable[str] = ()) -> list[ListedVersion] | None:
    """All versions; None where the database is not one of SCHEMA."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=20)) as database:
            database.execute("BEGIN")  # one state of it
            if database.execute("SELECT version_num FROM alembic_version").fetchall() != [(SCHEMA,)]:
                return None
            aliases = defaultdict(list)
            for model, version, alias in database.execute(ALIASES):
                aliases[model, version].append(alias)
            values = {metric: dict(database.execute(METRIC, {"metric": metric})) for metric in metrics}
            rows = database.execute(VERSIONS, {"name": name})
            return [
                _with_metrics(
                    ListedVersion(
                        model,
                        version,
                        source,
                        created,
                        run_id or None,
                        json.loads(tags),
                        tuple(aliases[model, version]),
                    ),
                    values,
                )
                for model, version, source, created, run_id, tags in rows
            ]
    except sqlite3.Error:  # MLflow finds the words
        return None


def _from_mlflow(
    client: RetryingMlflowClient, name: str | None, conditions: Sequence[Condition] = (), metrics: Iterable[str] = ()
) -> list[ListedVersion]:
    """As MLflow finds them: those of which the conditions hold, and others where it cannot be asked for that."""
    asked = [condition for condition in conditions if condition.is_expressible]
    own = [Condition("attribute", "name", "=", name)] if name else []
    versions = [
        version
        for version in _pages(
            client.search_model_versions,
            to_filter_string([*own, *(condition for condition in asked if condition.kind != "metric")]),
            order_by=["name ASC", "version_number ASC"],
        )
        if version.tags
    ]
    values = _metrics(client, [condition for condition in asked if condition.kind == "metric"], metrics)
    # MLflow's search leaves the aliases out.
    aliases = {model: read_aliases(client, model) for model in {version.name for version in versions}}
    return [
        _with_metrics(
            ListedVersion(
                v.name,
                int(v.version),
                v.source,
                v.creation_timestamp,
                v.run_id or None,
                dict(v.tags),
                tuple(sorted(alias for alias, number in aliases[v.name].items() if number == int(v.version))),
            ),
            values,
        )
        for v in versions
    ]


def _metrics(
    client: RetryingMlflowClient, conditions: Sequence[Condition], metrics: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Metric -> the id of a LoggedModel -> its newest value; of LoggedModels of which the conditions once held."""
    values: dict[str, dict[str, float]] = {metric: {} for metric in metrics}
    experiment = client.get_experiment_by_name(EXPERIMENT) if values else None
    if experiment is None:
        return values

    def search(asked: str, **page: Any) -> Any:
        return client.search_logged_models([experiment.experiment_id], asked, **page)

    for model in _pages(search, to_filter_string(conditions)):
        for metric in sorted(model.metrics or (), key=lambda metric: (metric.timestamp, metric.step)):
            if metric.key in values:
                values[metric.key][model.model_id] = metric.value
    return values


def _pages(search: Callable[..., Any], filter_string: str, **options: Any) -> Iterator[Any]:
    """All that a search of MLflow's finds."""
    token = None
    while True:
        page = search(filter_string, max_results=1000, page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


def _with_metrics(version: ListedVersion, values: Mapping[str, Mapping[str, float]]) -> ListedVersion:
    """The version with its own of the values."""
    if not values:
        return version
    model = version.tags.get(MODEL_ID, "")
    return version._replace(metrics={metric: of[model] for metric, of in values.items() if model in of})


def read_aliases(client: RetryingMlflowClient, name: str) -> dict[str, int]:
    """Alias -> version number, of a registered model; empty where there is no such model."""
    try:
        aliases = client.get_registered_model(name).aliases
    except NotFound:
        return {}
    return {alias: int(number) for alias, number in aliases.items()}


def describe_read_error(error: Exception) -> str:
    """Why the tags or the date of a version cannot be read, in words."""
    if not isinstance(error, ValidationError):
        return f"its date is none ({error})"
    problems = error.errors(include_url=False, include_context=False)
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))}: {each['msg']}, not {each['input']!r:.60}" for each in problems
    )
