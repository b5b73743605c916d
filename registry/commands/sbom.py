"""`limbeck models sbom`: what went into a version, with digests, and who signed that."""

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
@click.option("--output", type=click.Path(path_type=Path), help="A file; its signatures go beside it.")
@click.option("--attest", is_flag=True, help="Keep it with the version, signed by the key of LIMBECK_SIGNING_KEY.")
@click.option("--verify", is_flag=True, help="Hold the kept one against the version's files and the trusted keys.")
def sbom(model: str, output: Path | None, attest: bool, verify: bool) -> None:
    """The bill of materials of MODEL, NAME/VERSION or NAME@ALIAS, as CycloneDX 1.6 JSON.

    A promotion keeps one, and an alias has the one of its promotion. Where none is kept, it is made from what the
    registry knows now.
    """
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.provenance import attestation

    store = Store()
    version = store.get(model)
    found = attestation.sbom_of_ref(store, model)
    if attest and "@" in model and found is not None:  # the one that the ledger names stays the alias's own
        found = attestation.sign_sbom(store, version, found)
    elif attest:
        found = attestation.find_sbom(store, version, attestation.attest(store, version))
    if verify:
        _print_verification(store, version, found)
        return
    if found is None:
        found = attestation.build_sbom(store, version)
        print_status(f"{version.ref} has none yet; this one is neither kept nor signed: --attest does both")
    _write(found, output)


def _print_verification(store: Store, version: Version, found: Sbom | None) -> None:
    """Tell what holds of a kept bill; raises what does not."""
    from limbeck.registry.core import signing
    from limbeck.registry.provenance import sbom as bill

    if found is None:
        raise BadInput(f"{version.ref} has no bill of materials", fix=f"limbeck models sbom {version.ref} --attest")
    store.artifacts.verified_folder(version)
    signer = bill.verify_sbom(found, version.digest, version.ref)
    print(f"{version.ref}: bill of materials {found.digest}, of these very files")
    if signer is not None:
        print(f"signed by {signer}")
        return
    for signature in found.signatures:
        if not signing.verify_signature(found.signed_bytes, signature, signature.key):
            raise DamagedArtifact(version.ref, [f"the signature of {signature.key} does not fit its bill of materials"])
        print(f"signed with {signature.key}, which is held against no list: {signing.TRUSTED_KEYS_VARIABLE} is not set")
    if not found.signatures:
        print("not signed")


def _write(found: Sbom, output: Path | None) -> None:
    write_report(found.text, output)
    if output is not None and found.signatures:
        write_report(found.signatures_json(), output.with_suffix(".signatures.json"))
