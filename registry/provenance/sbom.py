"""A bill of materials as it is kept: read, held against an artifact and against whom to trust.

It lies beside an artifact as `sbom.json` (CycloneDX) with the signatures over its very bytes in `sbom.signatures.json`.
`limbeck.registry.provenance.attestation` writes it. Standard library only, so a serving host can use it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.registry.core import signing
from limbeck.registry.core.digest import digest_of, text_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.signing import SBOM, Signature

FILE, SIGNATURES = "sbom.json", "sbom.signatures.json"


class Bill(NamedTuple):
    """A bill of materials and who signed it."""

    text: str  # CycloneDX JSON; digest and signatures are over these very bytes (UTF-8)
    signatures: tuple[Signature, ...] = ()

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the text."""
        return text_digest(self.text)

    @property
    def signed(self) -> bytes:
        """What a signature is over."""
        return SBOM + self.text.encode()

    def signatures_text(self) -> str:
        """The signatures as a file has them."""
        return json.dumps([signature._asdict() for signature in self.signatures], indent=1) + "\n"

    def artifact(self) -> str:
        """The digest of the artifact whose files are listed. Raises ValueError where it lists none."""
        try:
            component: dict[str, Any] = json.loads(self.text)["metadata"]["component"]
            parts = component["components"]
            return digest_of({part["name"]: part["hashes"][0]["content"] for part in parts if part["type"] == "file"})
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"no files are listed: {error!r}") from None


def read(folder: Path) -> Bill | None:
    """The bill that lies in a folder, and its signatures; None where there is none. Raises DamagedArtifact."""
    if not (folder / FILE).is_file():
        return None
    try:
        text = (folder / FILE).read_bytes().decode()
        kept = json.loads((folder / SIGNATURES).read_bytes()) if (folder / SIGNATURES).is_file() else []
        return Bill(text, tuple(Signature(str(each["key"]), str(each["signature"])) for each in kept))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(folder, [f"{FILE} or {SIGNATURES} cannot be read: {error!r}"]) from None


def write(folder: Path, bill: Bill) -> None:
    """Lay a bill and its signatures into a folder."""
    (folder / FILE).write_bytes(bill.text.encode())
    if bill.signatures:
        (folder / SIGNATURES).write_text(bill.signatures_text())


def check(bill: Bill | None, digest: str, what: str) -> str | None:
    """Hold a bill against the artifact that it is of, and against whom to trust.

    Args:
        bill: None where the artifact has none, which is enough where no keys are trusted.
        digest: the artifact's.
        what: the artifact, for an error.

    Returns:
        Who signed it, by the name in the file of trusted keys; None where no such file is configured.

    Raises:
        DamagedArtifact: a bill of another artifact, or a signature that does not fit.
        BadInput: trusted keys are configured, and none of them signed it.
    """
    trusted = signing.trusted()
    if bill is not None:
        check_subject(bill, digest, what)
    if trusted is None:
        return None
    unsigned = f"and {signing.TRUSTED} asks for one that is signed"
    fix = f"where the registry and the key are: set {signing.KEY_FILE}, then limbeck models sbom MODEL --attest"
    if bill is None:
        raise BadInput(f"{what} has no bill of materials, {unsigned}", fix=fix)
    if not bill.signatures:
        raise BadInput(f"the bill of materials of {what} is not signed, {unsigned}", fix=fix)
    known = [signature for signature in bill.signatures if signature.key in trusted]
    if not known:
        keys = ", ".join(signature.key for signature in bill.signatures)
        raise BadInput(
            f"the bill of materials of {what} is signed, but by no key that {signing.TRUSTED} lists: {keys}",
            fix="have it signed by one of those, or, where you know whose key it is, add it to the file",
        )
    for signature in known:
        if signing.verify(bill.signed, signature, signature.key):
            return trusted[signature.key]
    names = ", ".join(trusted[signature.key] for signature in known)
    raise DamagedArtifact(what, [f"the signature of {names} does not fit its bill of materials: one was changed"])


def check_subject(bill: Bill, digest: str, what: str) -> None:
    """Raises DamagedArtifact unless a bill is of the artifact of a digest; `what` names that for the error."""
    try:
        listed = bill.artifact()
    except ValueError as error:
        raise DamagedArtifact(what, [f"its bill of materials cannot be read: {error}"]) from None
    if listed != digest:
        raise DamagedArtifact(what, [f"its bill of materials is of other files ({listed[:12]}, not {digest[:12]})"])
