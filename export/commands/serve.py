"""`limbeck deploy` and `serve`: what a serving host runs, without torch, transformers or MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from limbeck.export.commands.options import device_option, threads_option
from limbeck.registry.core.terminal import format_option, print_json, print_status

if TYPE_CHECKING:
    from limbeck.export.runtime.runtime import Runtime

AT_LEAST_1 = click.IntRange(min=1)
SECONDS = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("model")
@click.option("--to", type=click.Path(path_type=Path), required=True, help="The bundle's folder.")
@format_option
def deploy(model: str, to: Path, output_format: str) -> None:
    """Write the ONNX artifact MODEL, verified, to a folder with all that serves it.

    A host needs Python and the folder's requirements.txt: no torch, transformers, MLflow or registry, nor Limbeck.
    The folder's README.md tells how to start it, by hand, by systemd or in a container; model/README.md is the model
    card of a registered MODEL, sbom.json its bill of materials. Where LIMBECK_TRUSTED_KEYS names a file of keys, one
    of them has to have signed that.
    """
    from limbeck.export.bundle.deploy import write_bundle as write
    from limbeck.export.commands.locate import find_onnx_artifact

    found = find_onnx_artifact(model)
    told = None
    if found.version:
        from limbeck.registry.catalog.model_card import model_card
        from limbeck.registry.mlflow.store import Store

        told = model_card(Store(), found.version)
    digest = write(
        found.path, to, digest=found.digest, manifest_fields={"model": found.name}, model_card=told, sbom=found.sbom
    )
    if output_format == "json":
        sbom = found.sbom and found.sbom.digest
        said = {"bundle": str(to), "model": found.name, "digest": digest, "sbom": sbom, "signed_by": found.signed_by}
        print_json(said)
        return
    signed = f", signed by {found.signed_by}" if found.signed_by else ""
    billed = f", bill of materials {found.sbom.digest[:12]}{signed}" if found.sbom else ", no bill of materials"
    print(f"{to}: {found.name}, digest {digest[:12]}, verified{billed}")
    print_status(f"serve it: {to}/start (see {to}/README.md)")


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@threads_option
@device_option
@click.option("--max-num-seqs", default=64, show_default=True, type=AT_LEAST_1, help="Rows decoded together.")
@click.option("--max-queue", default=256, show_default=True, type=click.IntRange(0), help="Requests that may wait.")
@click.option("--timeout", default=600.0, show_default=True, type=SECONDS, help="Seconds that a request may take.")
@click.option("--max-prompt-tokens", type=AT_LEAST_1, help="Of one prompt. [default: the context]")
@click.option("--max-new-tokens", type=AT_LEAST_1, help="Of one choice. [default: the context]")
@click.option("--cache-mb", type=AT_LEAST_1, help="Of all rows' keys and values. [default: half of the free memory]")
@click.option("--max-body-mb", default=4, show_default=True, type=AT_LEAST_1, help="Of one request.")
@click.option("--drain-seconds", default=30.0, show_default=True, type=SECONDS, help="For the last requests.")
@click.option("--follow-seconds", default=5.0, show_default=True, type=SECONDS, help="Between two looks at MODEL.")
def serve(
    model: str, host: str, port: int, threads: int | None, device: Literal["cpu", "cuda"], **options: Any
) -> None:
    """Serve the ONNX model MODEL over OpenAI-compatible HTTP under /v1, with /health, /ready and /metrics.

    MODEL is a bundle or ONNX folder, NAME/VERSION or NAME@ALIAS. Where LIMBECK_API_KEY is set, clients have to
    send it as their API key. Where LIMBECK_TRUSTED_KEYS names a file of keys, nothing is served, at first or later,
    whose bill of materials none of them signed.

    Requests that arrive together are decoded together. More than --max-queue of them wait for no place: they are
    answered 429 with Retry-After. SIGTERM lets those that run and wait end first; new ones are answered 503.

    An alias is followed: when it moves, new requests go to the new artifact, and those that run end on the old
    one; until then both are in memory, so have room for twice the model. A damaged artifact is refused and the old
    one stays. A folder whose limbeck.json changes is loaded again in the same way, at once on SIGHUP.
    """
    from limbeck.export.commands.locate import find_onnx_artifact
    from limbeck.export.runtime.runtime import Runtime
    from limbeck.export.server.app import open_listener
    from limbeck.export.server.app import serve as run
    from limbeck.export.server.hot_swap import ServedModel
    from limbeck.export.server.requests import Limits
    from limbeck.export.server.watch import AliasWatcher, Artifact, FolderWatcher

    def load(path: Path, digest: str | None) -> Runtime:
        return Runtime.load(path, threads=threads, device=device, expected_digest=digest)

    limits = Limits(
        rows=options["max_num_seqs"],
        queue=options["max_queue"],
        timeout_s=options["timeout"],
        prompt_tokens=options["max_prompt_tokens"],
        new_tokens=options["max_new_tokens"],
        cache_bytes=options["cache_mb"] and options["cache_mb"] * 2**20,
    )
    follow: AliasWatcher | FolderWatcher = AliasWatcher(model, options["follow_seconds"])
    if Path(model).expanduser().is_dir():
        here = find_onnx_artifact(model)
        follow = FolderWatcher(Artifact(here.path, here.name, here.digest), options["follow_seconds"])
    try:
        found = follow.current_artifact()
        served = ServedModel(model if "@" in model else found.name, found, load, limits)  # a name that stays
        listener = open_listener(host, port)
        api_key = os.environ.get("LIMBECK_API_KEY") or None
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
        print_status(f"{served.name}, digest {served.current().digest[:12]}, at {address}")
        if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
            print_status("no API key is asked for: set LIMBECK_API_KEY to ask for one")
        run(
            served,
            listener,
            artifacts=follow.watch(),
            api_key=api_key,
            max_body=options["max_body_mb"] * 2**20,
            drain_s=options["drain_seconds"],
        )
    finally:
        follow.close()
