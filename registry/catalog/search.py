"""Searches versions by fields, tags, metrics, date (`limbeck models list --since`, `--until`) and alias, and sorts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.filters import Condition, parse_filter
from limbeck.registry.records import Cost, Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store

METRIC = re.compile(r"\s*([^<>=!`]+?)\s*(<=|>=|!=|=|<|>)\s*(\S+)\s*")
SORTABLE = ("version", "created", "kind", "recipe", "precision", "params", "licence", "author")


class SearchHit(NamedTuple):
    """A version that matches a query."""

    ref: str  # NAME/VERSION
    version: Version | None
    unreadable: str | None  # why there is no `version`
    metrics: Mapping[str, float]  # those in the conditions or the sort key


@dataclass(frozen=True)
class Query:
    """Conditions on versions, which all have to hold, and the order of the results."""

    conditions: tuple[Condition, ...] = ()
    since: datetime | None = None  # registered then or later
    until: datetime | None = None  # registered before
    alias: str | None = None
    sort: str | None = None  # a field of SORTABLE or a metric; a minus before it for descending order
    limit: int | None = None


def build_conditions(
    fields: Mapping[str, str | None], tags: Sequence[str] = (), metrics: Sequence[str] = (), text: str = ""
) -> tuple[Condition, ...]:
    """The conditions of the options of `limbeck models list`.

    Args:
        fields: field of a version, such as kind, -> value; a licence in upper or lower case.
        tags: KEY=VALUE.
        metrics: such as "retention >= 0.9".
        text: a filter in MLflow's filter language.

    Raises BadInput, naming the option that is invalid.
    """
    conditions = list(parse_filter(text))
    for field, value in fields.items():
        if value is not None:
            conditions.append(Condition("tag", f"limbeck.{field}", "ILIKE" if field == "licence" else "=", value))
    for tag in tags:
        key, equals, value = tag.partition("=")
        if not equals or not key:
            raise BadInput(f"--tag {tag!r} is not KEY=VALUE")
        conditions.append(Condition("tag", key, "=", value))
    for comparison in metrics:
        match = METRIC.fullmatch(comparison)
        if match is None:
            raise BadInput(f"--metric {comparison!r} is not a comparison", fix="write --metric 'retention >= 0.9'")
        try:
            conditions.append(Condition("metric", metric_name(match[1]), match[2], float(match[3])))
        except ValueError:
            raise BadInput(f"--metric {comparison!r}: {match[3]} is not a number") from None
    return tuple(conditions)


def metric_name(text: str) -> str:
    """The name of a metric in MLflow: `retention` is retention.value, a cost figure is cost.FIGURE."""
    if text in ("retention", "cost"):
        return {"retention": "retention.value", "cost": "cost.usd_per_million_tokens"}[text]
    return f"cost.{text}" if text in Cost.model_fields else text


def search_versions(store: Store, name: str | None, query: Query) -> list[SearchHit]:
    """The versions of `name`, or of all models, that match `query`; by name and oldest first without a sort key.

    Includes versions whose tags cannot be read, unless the query needs their date.

    Raises BadInput: a metric that no version has.
    """
    key = (query.sort or "").removeprefix("-")
    metric = metric_name(key) if key and key not in SORTABLE else None
    found = []
    for listed, version in store.versions_or_errors(name, query.conditions, [metric] if metric else []):
        if query.alias is not None and query.alias not in listed.aliases:
            continue
        if isinstance(version, Version):
            if (query.since and version.created < query.since) or (query.until and version.created >= query.until):
                continue
            found.append(SearchHit(version.ref, version, None, listed.metrics))
        elif not (query.since or query.until):
            why = version.message.partition(" is unreadable: ")[2] or version.message
            found.append(SearchHit(f"{listed.name}/{listed.version}", None, why, listed.metrics))
    if not found:
        _check_metrics(store, name, {*([metric] if metric else []), *_metrics_of(query)})
    if query.sort:
        found = _sort_hits(found, key, metric, query.sort.startswith("-"))
    return found[: query.limit]


def _metrics_of(query: Query) -> list[str]:
    return [condition.key for condition in query.conditions if condition.kind == "metric"]


def _check_metrics(store: Store, name: str | None, metrics: set[str]) -> None:
    """Raises BadInput for a metric that no version has: that is a mistake, not a search without a result."""
    if not metrics:
        return
    existing = {metric for listed, _ in store.versions_or_errors(name, (), metrics) for metric in listed.metrics}
    missing = sorted(metrics - existing)
    if missing:
        raise BadInput(
            f"no version has a metric {missing[0]!r}",
            fix="metrics are retention, cost_ratio, speedup, TASK.METRIC and cost figures such as p50_ms",
        )


def _sort_hits(found: list[SearchHit], key: str, metric: str | None, descending: bool) -> list[SearchHit]:
    """Sorted by a field or metric; hits without a value come last."""

    def value(hit: SearchHit) -> Any:
        if metric:
            return hit.metrics.get(metric)
        return getattr(hit.version, key, None)

    known = [hit for hit in found if value(hit) is not None]
    return sorted(known, key=value, reverse=descending) + [hit for hit in found if value(hit) is None]


def parse_date(text: str) -> datetime:
    """A date, or a date and time; in UTC without a time zone. Raises BadInput."""
    try:
        given = datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(f"{text!r} is not a date", fix="write 2026-11-01, or 2026-11-01T12:00") from None
    return given if given.tzinfo else given.replace(tzinfo=UTC)
