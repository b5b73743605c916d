"""The state that all requests share: store, policy, guard and the address of MLflow's own pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote, urlsplit, urlunsplit

from fastapi import Request

from limbeck.registry.mlflow.client import NotFound
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import Policy
from limbeck.web.leaderboards import LeaderboardCache
from limbeck.web.security import Guard


@dataclass(frozen=True)
class Site:
    """Shared state of all requests; `limbeck.web.app.create_app` makes it once."""

    store: Store
    guard: Guard
    policy: Policy | None = None  # for aliases that no policy protects
    mlflow_ui: str | None = None  # address of MLflow's own pages, without credentials

    @cached_property
    def leaderboards(self) -> LeaderboardCache:
        """The cached leaderboards of all models."""
        return LeaderboardCache(self.store)

    def run_link(self, run_id: str) -> str | None:
        """The address of a run in MLflow's own pages; None if their address is unknown or the run was deleted."""
        if self.mlflow_ui is None:
            return None
        try:
            experiment = self.store.client.get_run(run_id).info.experiment_id
        except NotFound:
            return None
        return f"{self.mlflow_ui}/#/experiments/{quote(experiment)}/runs/{quote(run_id)}"


def current_site(request: Request) -> Site:
    """FastAPI dependency: the site of a request."""
    site: Site = request.app.state.site
    return site


def public_address(address: str | None) -> str | None:
    """An http(s) address without user, password, query and fragment; None for any other address."""
    parts = urlsplit(address or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
