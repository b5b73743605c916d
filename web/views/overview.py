"""The list of all registered models."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, NamedTuple

from limbeck.evals.leaderboard.ranking import sort_value
from limbeck.registry.core.errors import LimbeckError, Unreachable
from limbeck.registry.gate import approvals
from limbeck.registry.mlflow.listing import ListedVersion, list_versions
from limbeck.registry.mlflow.versions import TAG_PREFIX
from limbeck.registry.records import USD, LeaderboardRow
from limbeck.web.site import Site


class ModelSummary(NamedTuple):
    """One line of the list: a registered model."""

    name: str
    versions: int
    teacher: str | None  # NAME/VERSION of the newest student's teacher
    newest: str  # NAME/VERSION
    created: datetime  # of the newest version
    aliases: dict[str, str]  # alias -> NAME/VERSION
    best: LeaderboardRow | None  # the student with the highest retention; of equal ones the cheapest
    requests: int  # open approval requests

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        best = self.best.model_dump(mode="json") if self.best else None
        return self._asdict() | {"created": self.created.isoformat(), "best": best}


def models(site: Site) -> list[ModelSummary]:
    """Summarize all registered models, by name."""
    listed = list_versions(site.store.client, site.store.tracking_uri)
    versions = [version for version in listed if TAG_PREFIX + "digest" in version.tags]
    requests = Counter(state.request.name for state in approvals.open_requests(site.store))
    return [
        _summarize(site, name, list(group), requests[name]) for name, group in groupby(versions, key=lambda v: v.name)
    ]


def _summarize(site: Site, name: str, versions: list[ListedVersion], requests: int) -> ModelSummary:
    newest = versions[-1]
    teachers = [version.tags.get(TAG_PREFIX + "teacher") for version in versions]
    return ModelSummary(
        name=name,
        versions=len(versions),
        teacher=next(filter(None, reversed(teachers)), None),
        newest=f"{name}/{newest.version}",
        created=datetime.fromtimestamp(newest.creation_timestamp / 1000, UTC),
        aliases={alias: f"{name}/{version.version}" for version in versions for alias in version.aliases},
        best=_best_student(site, name),
        requests=requests,
    )


def _best_student(site: Site, name: str) -> LeaderboardRow | None:
    """The best row of the leaderboard; None if there is none or a score is damaged, which the model's page reports."""
    try:
        students = [row for row in site.leaderboards.rows(name) if row.kind != "teacher" and row.setting == 0]
    except Unreachable:
        raise
    except (LimbeckError, ValueError):
        return None
    scored = [(row, row.retention["value"]) for row in students if row.retention]
    # Retention is rounded to 0.1%, so that the cost decides between nearly equal students.
    best = max(scored, key=lambda pair: (round(pair[1], 3), -(sort_value(pair[0], USD) or 0)), default=None)
    return best[0] if best else None
