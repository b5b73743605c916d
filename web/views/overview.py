"""All registered models at a glance."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, NamedTuple

from limbeck.evals.leaderboard.ranking import sort_value
from limbeck.registry.core.errors import LimbeckError, Unreachable
from limbeck.registry.gate import approvals
from limbeck.registry.mlflow.findings import TAG_PREFIX
from limbeck.registry.mlflow.listing import ListedVersion, list_versions
from limbeck.registry.records import USD, LeaderboardRow
from limbeck.web.site import Site


class ModelSummary(NamedTuple):
    """A registered model in a line."""

    name: str
    versions: int
    teacher: str | None  # NAME/VERSION that the newest student learnt from
    newest: str
    created: datetime  # of the newest
    aliases: dict[str, str]  # alias -> NAME/VERSION
    best: LeaderboardRow | None  # of its students, the most quality kept, the cheapest of several
    requests: int  # that wait for an answer

    def to_json(self) -> dict[str, Any]:
        best = self.best.model_dump(mode="json") if self.best else None
        return self._asdict() | {"created": self.created.isoformat(), "best": best}


def models(site: Site) -> list[ModelSummary]:
    """By name."""
    every = [
        each for each in list_versions(site.store.client, site.store.tracking_uri) if TAG_PREFIX + "digest" in each.tags
    ]
    waiting = Counter(each.request.name for each in approvals.open_requests(site.store))
    return [_model(site, name, list(several), waiting[name]) for name, several in groupby(every, key=lambda v: v.name)]


def _model(site: Site, name: str, several: list[ListedVersion], requests: int) -> ModelSummary:
    newest = several[-1]
    return ModelSummary(
        name=name,
        versions=len(several),
        teacher=next((t for each in reversed(several) if (t := each.tags.get(TAG_PREFIX + "teacher"))), None),
        newest=f"{name}/{newest.version}",
        created=datetime.fromtimestamp(newest.creation_timestamp / 1000, UTC),
        aliases={alias: f"{name}/{each.version}" for each in several for alias in each.aliases},
        best=_best(site, name),
        requests=requests,
    )


def _best(site: Site, name: str) -> LeaderboardRow | None:
    """None too where its scores are damaged: its own page says so."""
    try:
        students = [row for row in site.leaderboards.rows(name) if row.kind != "teacher" and row.setting == 0]
    except Unreachable:
        raise
    except (LimbeckError, ValueError):
        return None
    known = [(row, row.retention["value"]) for row in students if row.retention]
    # To a tenth of a per cent: what is kept to the same figure goes by its cost.
    best = max(known, key=lambda each: (round(each[1], 3), -(sort_value(each[0], USD) or 0)), default=None)
    return best[0] if best else None
