"""`limbeck ui`: the pages over HTTP."""

from __future__ import annotations

import click


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8600, show_default=True, help="0 takes a free one.")
def ui(host: str, port: int) -> None:
    """The registry as web pages: look, compare, promote and roll back."""
    import uvicorn

    from registry.store import Store
    from web.app import create_app

    uvicorn.run(create_app(Store()), host=host, port=port, log_level="warning")
