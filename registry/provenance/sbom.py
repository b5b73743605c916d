"""Reads, writes and verifies the SBOM beside an artifact: its subject, its signatures and whom to trust.

The SBOM is `sbom.json` (CycloneDX), the signatures over its exact bytes are in `sbom.signatures.json`.
`limbeck.registry.provenance.attestation` makes it. A serving host imports this module, so it needs no MLflow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.registry.core import signing
from limbeck.registry.core.digest import artifact_digest, text_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.signing import SBOM_DOMAIN, Signature

SBOM_FILE, SIGNATURES_FILE = "sbom.json", "sbom.signatures.json"


class Sbom(NamedTuple):
    """An SBOM and its signatures."""

    text: str  # CycloneDX JSON; digest and signatures are over its UTF-8 bytes
    signatures: tuple[Signature, ...] = ()

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the text."""
        return text_digest(self.text)

    @property
    def signed_bytes(self) -> bytes:
        """The bytes that a signature signs."""
        return SBOM_DOMAIN + self.text.encode()

    def signatures_json(self) -> str:
        """The signatures as JSON, as the file has them."""
        return json.dumps([signature._asdict() for signature in self.signatures], indent=1) + "\n"

    def artifact_digest(self) -> str:
        """The digest of the artifact whose files the SBOM lists. Raises ValueError if it lists none."""
        try:
            component: dict[str, Any] = json.loads(self.text)["metadata"]["component"]
            parts = component["components"]
            return artifact_digest(
                {part["name"]: part["hashes"][0]["content"] for part in parts if part["type"] == "file"}
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"no files are listed: {error!r}") from None


def read_sbom(folder: Path) -> Sbom | None:
    """The SBOM in a folder with its signatures; None if there is none. Raises DamagedArtifact if it is not readable."""
    if not (folder / SBOM_FILE).is_file():
        return None
    try:
        text = (folder / SBOM_FILE).read_bytes().decode()
        fields = json.loads((folder / SIGNATURES_FILE).read_bytes()) if (folder / SIGNATURES_FILE).is_file() else []
        return Sbom(text, tuple(Signature(str(each["key"]), str(each["signature"])) for each in fields))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(folder, [f"{SBOM_FILE} or {SIGNATURES_FILE} cannot be read: {error!r}"]) from None


def write_sbom(folder: Path, sbom: Sbom) -> None:
    """Write an SBOM and its signatures into a folder."""
    (folder / SBOM_FILE).write_bytes(sbom.text.encode())
    if sbom.signatures:
        (folder / SIGNATURES_FILE).write_text(sbom.signatures_json())


def verify_sbom(sbom: Sbom | None, digest: str, artifact_name: str) -> str | None:
    """Check that an SBOM is of an artifact, and that a trusted key signed it.

    Args:
        sbom: None if the artifact has none, which is an error only if trusted keys are configured.
        digest: of the artifact.
        artifact_name: for errors.

    Returns:
        The name of the signer in the file of trusted keys; None if no such file is configured.

    Raises:
        DamagedArtifact: the SBOM of another artifact, or a signature that does not match.
        BadInput: trusted keys are configured, and none of them signed it.
    """
    trusted = signing.read_trusted_keys()
    if sbom is not None:
        check_sbom_subject(sbom, digest, artifact_name)
    if trusted is None:
        return None
    requirement = f"and {signing.TRUSTED_KEYS_VARIABLE} requires a signed one"
    fix = (
        f"on the machine with the registry and the key: set {signing.KEY_FILE_VARIABLE}, "
        "then limbeck models sbom MODEL --attest"
    )
    if sbom is None:
        raise BadInput(f"{artifact_name} has no SBOM, {requirement}", fix=fix)
    if not sbom.signatures:
        raise BadInput(f"the SBOM of {artifact_name} is not signed, {requirement}", fix=fix)
    known = [signature for signature in sbom.signatures if signature.key in trusted]
    if not known:
        keys = ", ".join(signature.key for signature in sbom.signatures)
        raise BadInput(
            f"the SBOM of {artifact_name} is signed, but not with a key that "
            f"{signing.TRUSTED_KEYS_VARIABLE} lists: {keys}",
            fix="have it signed with one of those, or add the key to the file if you know whose it is",
        )
    for signature in known:
        if signing.verify_signature(sbom.signed_bytes, signature, signature.key):
            return trusted[signature.key]
    names = ", ".join(trusted[signature.key] for signature in known)
    raise DamagedArtifact(artifact_name, [f"the signature of {names} does not match its SBOM: one of them was changed"])


def check_sbom_subject(sbom: Sbom, digest: str, artifact_name: str) -> None:
    """Raises DamagedArtifact unless the SBOM is of the artifact with this digest; `artifact_name` is for the error."""
    try:
        listed = sbom.artifact_digest()
    except ValueError as error:
        raise DamagedArtifact(artifact_name, [f"its SBOM cannot be read: {error}"]) from None
    if listed != digest:
        raise DamagedArtifact(artifact_name, [f"its SBOM is of other files ({listed[:12]}, not {digest[:12]})"])
