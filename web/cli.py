"""`limbeck ui`: serve the web pages."""

from __future__ import annotations

import os
from contextlib import closing, suppress
from pathlib import Path

import click

from limbeck.registry.core.terminal import print_status


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8600,
    show_default=True,
    help="Port to listen on; 0: any free port.",
)
@click.option(
    "--allow-host", multiple=True, metavar="NAME", help="Host name that browsers use for these pages; repeatable."
)
@click.option(
    "--policy",
    "path",
    type=click.Path(path_type=Path),
    help="Policy of aliases that no policy protects.  [default: ./policy.toml if it exists]",
)
@click.option("--mlflow-ui", metavar="URL", help="Address of MLflow's own pages, to link runs to.")
@click.option("--open", "open_browser", is_flag=True, help="Open the pages in the browser.")
def ui(
    host: str, port: int, allow_host: tuple[str, ...], path: Path | None, mlflow_ui: str | None, open_browser: bool
) -> None:
    """Serve the registry as web pages: browse, compare, promote and roll back.

    Every change needs a token, and the ledger records it under the user who runs this command. On the loopback
    address everybody on this machine can read; on any other address, reading needs the token too. Set the token in
    LIMBECK_UI_TOKEN; otherwise a new one is made and printed once. Stop with Ctrl-C.
    """
    import uvicorn

    from limbeck.export.server.app import open_listener
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.policy.file import load_policy
    from limbeck.web.app import create_app
    from limbeck.web.security import is_loopback, token_or_new

    configured_token = os.environ.get("LIMBECK_UI_TOKEN")
    token = token_or_new(configured_token)
    default_path = Path("policy.toml")
    policy = load_policy(path or default_path) if path or default_path.exists() else None
    private = not is_loopback(host)
    app = create_app(
        Store(), policy=policy, token=token, mlflow_ui=mlflow_ui, hosts=(host, *allow_host), private=private
    )
    listener = open_listener(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    print_status(address)
    if private:
        print_status(
            "reachable from other machines: reading needs the token too; use a TLS proxy, "
            "or the token crosses the network unencrypted"
        )
    print_status("to change anything, log in with the token " + ("of LIMBECK_UI_TOKEN" if configured_token else token))
    if open_browser:
        click.launch(address)
    # No access log: an address may contain a search.
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=30
    )
    # uvicorn raises Ctrl-C again after its shutdown, but not in every case.
    with closing(listener), suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    print_status("stopped")
