"""`limbeck deploy` and `serve`: what a serving host runs, without torch, transformers or MLflow."""

from __future__ import annotations

import os
from pathlib import Path

import click

from export.cli import threads_option
from registry.terminal import format_option, print_json, say


@click.command()
@click.argument("model")
@click.option("--to", type=click.Path(path_type=Path), required=True, help="The bundle's folder.")
@format_option
def deploy(model: str, to: Path, output: str) -> None:
    """Copy the ONNX artifact MODEL, verified, to a folder that needs no registry.

    `limbeck serve DIR` serves it on a host without torch, transformers or MLflow.
    """
    from export.bundle import deploy as copy
    from export.find import find_onnx

    found = find_onnx(model)
    digest = copy(found.path, to, digest=found.digest, about={"model": found.name})
    if output == "json":
        print_json({"bundle": str(to), "model": found.name, "digest": digest})
        return
    print(f"{to}: {found.name}, digest {digest[:12]}, verified")
    say(f"serve it: limbeck serve {to}")


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@threads_option
def serve(model: str, host: str, port: int, threads: int | None) -> None:
    """Serve the ONNX model MODEL over OpenAI-compatible HTTP: /v1/completions, /v1/models, /health.

    MODEL is a bundle or ONNX folder, NAME/VERSION or NAME@ALIAS. Where LIMBECK_API_KEY is set, clients have to
    send it as their API key. SIGTERM lets running requests end first.
    """
    from export.find import find_onnx
    from export.runtime import Runtime
    from export.server import listen
    from export.server import serve as run

    found = find_onnx(model)
    runtime = Runtime.load(found.path, threads=threads, expected=found.digest)
    listener = listen(host, port)
    api_key = os.environ.get("LIMBECK_API_KEY") or None
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
    name = model if "@" in model else found.name  # a name that stays when the alias moves
    say(f"{name}, digest {runtime.digest[:12]}, at {address}")
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        say("no API key is asked for: set LIMBECK_API_KEY to ask for one")
    run(runtime, name, listener, api_key)
