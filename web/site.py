"""What the pages stand on: the store, the policy, the guard, the address of MLflow's own pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote, urlsplit, urlunsplit

from fastapi import Request

from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import Policy
from limbeck.web.leaderboards import LeaderboardCache
from limbeck.web.security import Guard


@dataclass(frozen=True)
class Site:
    """Made once by `limbeck.web.app.create_app`, the same for all requests."""

    store: Store
    guard: Guard  # who may change anything
    policy: Policy | None = None  # of aliases that no policy protects
    mlflow_ui: str | None = None  # where MLflow's own pages are, without credentials

    @cached_property
    def leaderboards(self) -> LeaderboardCache:
        """The leaderboards of all models."""
        return LeaderboardCache(self.store)

    def run_link(self, run_id: str) -> str | None:
        """The address of a run in MLflow's own pages; None where they are not known."""
        if self.mlflow_ui is None:
            return None
        experiment = self.store.client.get_run(run_id).info.experiment_id
        return f"{self.mlflow_ui}/#/experiments/{quote(experiment)}/runs/{quote(run_id)}"


def current_site(request: Request) -> Site:
    """The site that a request is for; a FastAPI dependency."""
    site: Site = request.app.state.site
    return site


def public_address(address: str | None) -> str | None:
    """An http(s) address without its name, password, query and fragment; None for any other."""
    parts = urlsplit(address or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
