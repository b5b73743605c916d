"""`limbeck models sbom`: print, store, sign and verify the SBOM of a version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.terminal import print_status, write_report

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.provenance.sbom import Sbom
    from limbeck.registry.records import Version


@click.command()
@click.argument("model")
@click.option(
    "--output", type=click.Path(path_type=Path), help="A file instead of stdout; the signatures are written beside it."
)
@click.option("--attest", is_flag=True, help="Store it with the version, signed with the key of LIMBECK_SIGNING_KEY.")
@click.option("--verify", is_flag=True, help="Check the stored SBOM: the version's files and trusted keys.")
def sbom(model: str, output: Path | None, attest: bool, verify: bool) -> None:
    """The SBOM of MODEL, NAME/VERSION or NAME@ALIAS, as CycloneDX 1.6 JSON.

    A promotion stores one, and an alias has that of its promotion. Without a stored SBOM, it is made from the current
    records.
    """
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.provenance import attestation

    store = Store()
    version = store.get(model)
    found = attestation.sbom_of_ref(store, model)
    if attest and "@" in model and found is not None:  # the alias keeps the SBOM that the ledger names
        found = attestation.sign_sbom(store, version, found)
    elif attest:
        found = attestation.find_sbom(store, version, attestation.attest(store, version))
    if verify:
        _print_verification(store, version, found)
        return
    if found is None:
        found = attestation.build_sbom(store, version)
        print_status(f"{version.ref} has no stored SBOM; this one is neither stored nor signed: --attest does both")
    _write_sbom(found, output)


def _print_verification(store: Store, version: Version, found: Sbom | None) -> None:
    """Print what is verified of a stored SBOM. Raises DamagedArtifact or BadInput for what is not."""
    from limbeck.registry.core import signing
    from limbeck.registry.provenance.sbom import verify_sbom

    if found is None:
        raise BadInput(f"{version.ref} has no SBOM", fix=f"limbeck models sbom {version.ref} --attest")
    store.artifacts.verified_folder(version)
    signer = verify_sbom(found, version.digest, version.ref)
    print(f"{version.ref}: SBOM {found.digest}, of exactly these files")
    if signer is not None:
        print(f"signed by {signer}")
        return
    for signature in found.signatures:
        if not signing.verify_signature(found.signed_bytes, signature, signature.key):
            raise DamagedArtifact(version.ref, [f"the signature of {signature.key} does not match its SBOM"])
        print(f"signed with {signature.key}, a key that was not checked: {signing.TRUSTED_KEYS_VARIABLE} is not set")
    if not found.signatures:
        print("not signed")


def _write_sbom(found: Sbom, output: Path | None) -> None:
    write_report(found.text, output)
    if output is not None and found.signatures:
        write_report(found.signatures_json(), output.with_suffix(".signatures.json"))
