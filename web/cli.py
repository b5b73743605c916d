"""`limbeck ui`: the pages over HTTP."""

from __future__ import annotations

import os
from pathlib import Path

import click

from limbeck.registry.core.terminal import print_status


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8600, show_default=True, help="0 takes a free one.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A name that the pages are reached by; repeatable.")
@click.option(
    "--policy",
    "path",
    type=click.Path(path_type=Path),
    help="Judges for aliases that no policy protects.  [default: ./policy.toml, if it is there]",
)
@click.option("--mlflow-ui", metavar="URL", help="Where MLflow's own pages are; runs are linked there.")
@click.option("--open", "browse", is_flag=True, help="Open them in the browser.")
def ui(
    host: str, port: int, allow_host: tuple[str, ...], path: Path | None, mlflow_ui: str | None, browse: bool
) -> None:
    """The registry as web pages: look, compare, promote and roll back.

    On this machine's own address anybody here may read. On any other, reading needs the token too. Changing
    anything always needs it, and is done as the user who runs this command. The token is that of
    LIMBECK_UI_TOKEN; where it is not set, one is made and told once. Ctrl-C ends it.
    """
    import uvicorn

    from limbeck.export.server.app import open_listener
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.policy.file import load_policy
    from limbeck.web.app import create_app
    from limbeck.web.security import is_loopback, token_or_new

    given = os.environ.get("LIMBECK_UI_TOKEN")
    token = token_or_new(given)
    here = Path("policy.toml")
    policy = load_policy(path or here) if path or here.exists() else None
    private = not is_loopback(host)
    app = create_app(
        Store(), policy=policy, token=token, mlflow_ui=mlflow_ui, hosts=(host, *allow_host), private=private
    )
    listener = open_listener(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    print_status(address)
    if private:
        print_status(
            "others can reach it: reading needs the token too; without TLS before it, the token can be read on the way"
        )
    print_status(f"to change anything, log in with the token{f' {token}' if not given else ' of LIMBECK_UI_TOKEN'}")
    if browse:
        click.launch(address)
    # No log of requests: an address may tell of a reason or a search.
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=30
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        print_status("stopped")
    finally:
        listener.close()
