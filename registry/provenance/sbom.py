"""A bill of materials as it is kept: read, held against an artifact and against whom to trust.

It lies beside an artifact as `sbom.json` (CycloneDX) with the signatures over its very bytes in `sbom.signatures.json`.
`limbeck.registry.provenance.attestation` writes it. Standard library only, so a serving host can use it.
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
    """A bill of materials and who signed it."""

    text: str  # CycloneDX JSON; digest and signatures are over these very bytes (UTF-8)
    signatures: tuple[Signature, ...] = ()

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the text."""
        return text_digest(self.text)

    @property
    def signed_bytes(self) -> bytes:
        """What a signature is over."""
        return SBOM_DOMAIN + self.text.encode()

    def signatures_json(self) -> str:
        """The signatures as a file has them."""
        return json.dumps([signature._asdict() for signature in self.signatures], indent=1) + "\n"

    def artifact_digest(self) -> str:
        """The digest of the artifact whose files are listed. Raises ValueError where it lists none."""
        try:
            component: dict[str, Any] = json.loads(self.text)["metadata"]["component"]
            parts = component["components"]
            return artifact_digest(
                {part["name"]: part["hashes"][0]["content"] for part in parts if part["type"] == "file"}
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"no files are listed: {error!r}") from None


def read_sbom(folder: Path) -> Sbom | None:
    """The bill that lies in a folder, and its signatures; None where there is none. Raises DamagedArtifact."""
    if not (folder / SBOM_FILE).is_file():
        return None
    try:
        text = (folder / SBOM_FILE).read_bytes().decode()
        kept = json.loads((folder / SIGNATURES_FILE).read_bytes()) if (folder / SIGNATURES_FILE).is_file() else []
        return Sbom(text, tuple(Signature(str(each["key"]), str(each["signature"])) for each in kept))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(folder, [f"{SBOM_FILE} or {SIGNATURES_FILE} cannot be read: {error!r}"]) from None


def write_sbom(folder: Path, sbom: Sbom) -> None:
    """Lay a bill and its signatures into a folder."""
    (folder / SBOM_FILE).write_bytes(sbom.text.encode())
    if sbom.signatures:
        (folder / SIGNATURES_FILE).write_text(sbom.signatures_json())


def verify_sbom(sbom: Sbom | None, digest: str, artifact_name: str) -> str | None:
    """Hold a bill against the artifact that it is of, and against whom to trust.

    Args:
        sbom: None where the artifact has none, which is enough where no keys are trusted.
        digest: the artifact's.
        artifact_name: the artifact, for an error.

    Returns:
        Who signed it, by the name in the file of trusted keys; None where no such file is configured.

    Raises:
        DamagedArtifact: a bill of another artifact, or a signature that does not fit.
        BadInput: trusted keys are configured, and none of them signed it.
    """
    trusted = signing.read_trusted_keys()
    if sbom is not None:
        check_sbom_subject(sbom, digest, artifact_name)
    if trusted is None:
        return None
    unsigned = f"and {signing.TRUSTED_KEYS_VARIABLE} asks for one that is signed"
    fix = (
        f"where the registry and the key are: set {signing.KEY_FILE_VARIABLE}, then limbeck models sbom MODEL --attest"
    )
    if sbom is None:
        raise BadInput(f"{artifact_name} has no bill of materials, {unsigned}", fix=fix)
    if not sbom.signatures:
        raise BadInput(f"the bill of materials of {artifact_name} is not signed, {unsigned}", fix=fix)
    known = [signature for signature in sbom.signatures if signature.key in trusted]
    if not known:
        keys = ", ".join(signature.key for signature in sbom.signatures)
        raise BadInput(
            f"the bill of materials of {artifact_name} is signed, but by no key that "
            f"{signing.TRUSTED_KEYS_VARIABLE} lists: {keys}",
            fix="have it signed by one of those, or, where you know whose key it is, add it to the file",
        )
    for signature in known:
        if signing.verify_signature(sbom.signed_bytes, signature, signature.key):
            return trusted[signature.key]
    names = ", ".join(trusted[signature.key] for signature in known)
    raise DamagedArtifact(
        artifact_name, [f"the signature of {names} does not fit its bill of materials: one was changed"]
    )


def check_sbom_subject(sbom: Sbom, digest: str, artifact_name: str) -> None:
    """Raises DamagedArtifact unless a bill is of the artifact of a digest; `artifact_name` names that for the error."""
    try:
        listed = sbom.artifact_digest()
    except ValueError as error:
        raise DamagedArtifact(artifact_name, [f"its bill of materials cannot be read: {error}"]) from None
    if listed != digest:
        raise DamagedArtifact(
            artifact_name, [f"its bill of materials is of other files ({listed[:12]}, not {digest[:12]})"]
        )
