"""The application: pages rendered on the server from the registry; nothing is fetched from elsewhere."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from registry.store import Store
from web.render import render


def create_app(store: Store) -> FastAPI:
    """The pages over a store.

    Args:
        store: where the versions are; its tracking server may come and go.
    """
    app = FastAPI(title="Limbeck", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/", response_class=HTMLResponse)
    def index() -> str:
        """All registered models."""
        return render("index.html", names=store.names())

    return app
