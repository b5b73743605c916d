"""`limbeck deploy`: write a bundle for a serving host."""

from __future__ import annotations

from pathlib import Path

import click

from limbeck.registry.core.terminal import format_option, print_json, print_status


@click.command()
@click.argument("model")
@click.option(
    "--output", "output_folder", type=click.Path(path_type=Path), required=True, help="The folder of the bundle."
)
@click.option(
    "--hashes/--no-hashes", default=True, show_default=True, help="Pin packages by their SHA-256; pip needs its index."
)
@format_option
def deploy(model: str, output_folder: Path, hashes: bool, output_format: str) -> None:
    """Verify the ONNX artifact MODEL and write it to a folder with everything that serves it.

    The host needs Python and the folder's requirements.txt: no torch, transformers, MLflow, registry or installed
    Limbeck. pip installs only packages with the hashes there, which are those of this machine's platform and Python.
    The folder's README.md explains how to start it by hand, with systemd or in a container. If MODEL is
    registered, model/README.md is its model card and sbom.json its SBOM. If LIMBECK_TRUSTED_KEYS names a file of
    keys, one of them must have signed the SBOM.
    """
    from limbeck.export.bundle.write import write_bundle
    from limbeck.export.commands.locate import find_onnx_artifact

    found = find_onnx_artifact(model)
    card = None
    if found.version:
        from limbeck.registry.catalog.model_card import model_card
        from limbeck.registry.mlflow.store import Store

        card = model_card(Store(), found.version)
    digest = write_bundle(
        found.path,
        output_folder,
        digest=found.digest,
        manifest_fields={"model": found.name},
        model_card=card,
        sbom=found.sbom,
        hashes=hashes,
    )
    if output_format == "json":
        print_json(
            {
                "bundle": str(output_folder),
                "model": found.name,
                "digest": digest,
                "sbom": found.sbom and found.sbom.digest,
                "signed_by": found.signed_by,
            }
        )
        return
    signed = f", signed by {found.signed_by}" if found.signed_by else ""
    sbom = f", SBOM {found.sbom.digest[:12]}{signed}" if found.sbom else ", no SBOM"
    print(f"{output_folder}: {found.name}, digest {digest[:12]}, verified{sbom}")
    print_status(f"serve it: {output_folder}/start (see {output_folder}/README.md)")
