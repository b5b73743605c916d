"""`limbeck serve`: an OpenAI-compatible server, without torch, transformers or MLflow.

A bundle runs this command, so everything it imports is copied into the bundle (limbeck.export.bundle.vendor).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from limbeck.export.commands.options import device_option, draft_option, prompt_lookup_option, threads_option
from limbeck.registry.core.terminal import print_status

if TYPE_CHECKING:
    from limbeck.export.runtime.runtime import Runtime

AT_LEAST_1 = click.IntRange(min=1)
SECONDS = click.FloatRange(min=0, min_open=True)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 picks a free port.")
@threads_option
@device_option
@click.option("--max-num-seqs", default=64, show_default=True, type=AT_LEAST_1, help="Sequences decoded together.")
@click.option("--max-queue", default=256, show_default=True, type=click.IntRange(0), help="Requests that may wait.")
@click.option("--timeout", default=600.0, show_default=True, type=SECONDS, help="Seconds that a request may take.")
@click.option("--max-prompt-tokens", type=AT_LEAST_1, help="Per prompt. [default: the context]")
@click.option("--max-new-tokens", type=AT_LEAST_1, help="Per choice. [default: the context]")
@click.option("--cache-mb", type=AT_LEAST_1, help="MB for all keys and values. [default: half of the free memory]")
@prompt_lookup_option
@draft_option
@click.option("--embeddings", type=click.Choice(["mean", "last"]), help="Serve embeddings of all tokens or the last.")
@click.option("--max-body-mb", default=4, show_default=True, type=AT_LEAST_1, help="MB per HTTP request.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let pages from ORIGIN use the server; * is any.")
@click.option(
    "--drain-seconds", default=30.0, show_default=True, type=SECONDS, help="Seconds to finish requests after SIGTERM."
)
@click.option(
    "--watch-seconds", default=5.0, show_default=True, type=SECONDS, help="Seconds between two checks of MODEL."
)
def serve(
    model: str, host: str, port: int, threads: int | None, device: Literal["cpu", "cuda"], **options: Any
) -> None:
    """Serve the ONNX model MODEL over OpenAI-compatible HTTP under /v1, with /health, /ready and /metrics.

    MODEL is a bundle or ONNX folder, NAME/VERSION or NAME@ALIAS. If LIMBECK_API_KEY is set, clients must send it as
    their API key. If LIMBECK_TRUSTED_KEYS names a file of keys, the server loads only models whose SBOM one of them
    signed, at start and later.

    Requests that arrive together are decoded together. At most --max-queue requests wait; more are answered 429 with
    Retry-After. On SIGTERM the server finishes running and waiting requests, and answers new ones 503.

    The server watches an alias: when it moves, new requests go to the new artifact, and running ones finish on the
    old one. Until then both are in memory, so have room for twice the model. A damaged artifact is refused and the
    old one stays. If MODEL is a folder, it is loaded again when its limbeck.json changes, and at once on SIGHUP.

    With --prompt-lookup-num-tokens or --draft, a request that decodes alone gets several tokens in one run where the
    proposed ones are what MODEL chooses; /metrics counts them.
    """
    from limbeck.export.commands.locate import find_onnx_artifact
    from limbeck.export.runtime.runtime import Runtime
    from limbeck.export.server.app import open_listener
    from limbeck.export.server.app import serve as run
    from limbeck.export.server.hot_swap import ServedModel
    from limbeck.export.server.memory import check_memory
    from limbeck.export.server.requests import Limits
    from limbeck.export.server.watch import AliasWatcher, Artifact, FolderWatcher

    def load(path: Path, digest: str | None) -> Runtime:
        if device == "cpu":
            check_memory(path, limits.cache_bytes)
        hidden = options["embeddings"] is not None
        runtime = Runtime.load(path, threads=threads, device=device, expected_digest=digest, hidden_states=hidden)
        runtime.speculate(options["prompt_lookup_num_tokens"], draft)
        return runtime

    limits = Limits(
        rows=options["max_num_seqs"],
        queue=options["max_queue"],
        timeout_s=options["timeout"],
        prompt_tokens=options["max_prompt_tokens"],
        new_tokens=options["max_new_tokens"],
        cache_bytes=options["cache_mb"] and options["cache_mb"] * 2**20,
    )
    draft: Runtime | None = None
    if options["draft"]:
        student = find_onnx_artifact(options["draft"])
        draft = Runtime.load(student.path, threads=threads, device=device, expected_digest=student.digest)
    watcher: AliasWatcher | FolderWatcher
    if Path(model).expanduser().is_dir():
        folder = find_onnx_artifact(model)
        watcher = FolderWatcher(Artifact(folder.path, folder.name, folder.digest), options["watch_seconds"])
    else:
        watcher = AliasWatcher(model, options["watch_seconds"])
    try:
        artifact = watcher.current_artifact()
        name = model if "@" in model else artifact.name  # an alias keeps its name when it moves
        served = ServedModel(name, artifact, load, limits, embeddings=options["embeddings"])
        listener = open_listener(host, port)
        api_key = os.environ.get("LIMBECK_API_KEY") or None
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
        print_status(f"{served.name}, digest {served.current().digest[:12]}, at {address}")
        if api_key is None and host not in LOOPBACK:
            print_status("no API key is required: set LIMBECK_API_KEY to require one")
        run(
            served,
            listener,
            artifacts=watcher.watch(),
            api_key=api_key,
            max_body=options["max_body_mb"] * 2**20,
            drain_s=options["drain_seconds"],
            cors=options["cors"],
        )
    finally:
        watcher.close()
