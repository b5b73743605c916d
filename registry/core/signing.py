"""Ed25519 signatures of SBOMs, approvals and ledger entries.

The private key is the PEM file that `LIMBECK_SIGNING_KEY` names (`limbeck keys new FILE` creates one); if the variable
is not set, nothing is signed. The file that `LIMBECK_TRUSTED_KEYS` names lists the trusted keys, one in each line:

    # KEY, 44 characters of base64               NAME
    GjTVLSn2Jyqg0uNHzrw7qgZdCzZfFtg8nLUkA7vMLRg= ada@example.org

Signed data begins with its kind, so a signature of an SBOM is never valid for an approval. A serving host needs only
the standard library, and `cryptography` only if LIMBECK_TRUSTED_KEYS is set.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_FILE_VARIABLE, TRUSTED_KEYS_VARIABLE = "LIMBECK_SIGNING_KEY", "LIMBECK_TRUSTED_KEYS"
# The kinds of signed data; each is the first line of the data.
SBOM_DOMAIN, APPROVAL_DOMAIN, LEDGER_DOMAIN = b"limbeck-sbom-v1\n", b"limbeck-approval-v1\n", b"limbeck-ledger-v1\n"
KEY_BYTES, SIGNATURE_BYTES = 32, 64


class Signature(NamedTuple):
    """A signature and the public key that verifies it."""

    key: str  # raw public key, base64
    signature: str  # base64


def sign(data: bytes) -> Signature | None:
    """Sign data with the configured key; None if no key is configured.

    Args:
        data: begins with SBOM_DOMAIN, APPROVAL_DOMAIN or LEDGER_DOMAIN.

    Raises:
        BadInput: the key file is missing, others may read it, or it holds no ed25519 key.
    """
    if not data.startswith((SBOM_DOMAIN, APPROVAL_DOMAIN, LEDGER_DOMAIN)):
        raise ValueError("signed data must begin with its kind")
    file = os.environ.get(KEY_FILE_VARIABLE)
    if not file:
        return None
    private = load_private_key(Path(file))
    return Signature(public_key(private), _text(private.sign(data)))


def verify_signature(data: bytes, signature: Signature, key: str) -> bool:
    """Whether `signature` is a valid signature of `data` by the public key `key` (base64)."""
    try:
        from cryptography.exceptions import InvalidSignature
    except ModuleNotFoundError:
        raise BadInput(
            f"{TRUSTED_KEYS_VARIABLE} is set, but cryptography, which verifies signatures, is not installed",
            fix="pip install cryptography",
        ) from None

    if signature.key != key:
        return False
    try:
        _public(key).verify(_bytes(signature.signature, SIGNATURE_BYTES), data)
    except (InvalidSignature, ValueError):
        return False
    return True


def read_trusted_keys() -> dict[str, str] | None:
    """Public key (base64) -> the name of its owner; None if `LIMBECK_TRUSTED_KEYS` is not set.

    Raises BadInput, with the line, if the file is missing or holds anything else.
    """
    file = os.environ.get(TRUSTED_KEYS_VARIABLE)
    if not file:
        return None
    form = "each line is a key and a name, as `limbeck keys show` prints them"
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadInput(f"{TRUSTED_KEYS_VARIABLE} names {file}, which cannot be read: {why}", fix=form) from None
    keys = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, _, name = line.strip().partition(" ")
        try:
            _bytes(key, KEY_BYTES)
        except ValueError:
            raise BadInput(f"{file}:{number}: not a public ed25519 key", fix=form) from None
        if not name.strip():
            raise BadInput(f"{file}:{number}: the key has no name", fix=form)
        keys[key] = name.strip()
    if not keys:
        raise BadInput(f"{file}, which {TRUSTED_KEYS_VARIABLE} names, has no key", fix=form)
    return keys


def create_key(file: Path) -> str:
    """Create a private key in `file`, readable only by its owner. Returns the public key, base64.

    Raises BadInput if `file` exists or cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        # O_EXCL with the mode: others can never read it, and an existing key is never overwritten.
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as written:
            written.write(pem)
    except FileExistsError:
        raise BadInput(f"{file} exists already", fix="choose another name; a key is never overwritten") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error.strerror}") from None
    return public_key(private)


def load_private_key(file: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file. Raises BadInput; also if anyone other than its owner may read the file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    make = f"create one: limbeck keys new {file}"
    try:
        mode, pem = file.stat().st_mode, file.read_bytes()
    except OSError as error:
        raise BadInput(f"the signing key {file} cannot be read: {error.strerror}", fix=make) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadInput(f"others may read the signing key {file}", fix=f"forbid that: chmod 600 {file}")
    try:
        private = load_pem_private_key(pem, password=None)
    except TypeError:
        raise BadInput(
            f"the signing key {file} is encrypted", fix=f"decrypt it: openssl pkey -in {file} -out FILE; chmod 600 FILE"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise BadInput(f"{file} holds no private key in PEM", fix=make) from None
    if not isinstance(private, Ed25519PrivateKey):
        raise BadInput(f"the key in {file} is not an ed25519 key", fix=make)
    return private


def public_key(private: Ed25519PrivateKey) -> str:
    """The public key of a private key, base64."""
    return _text(private.public_key().public_bytes_raw())


def _public(key: str) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(_bytes(key, KEY_BYTES))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str, length: int) -> bytes:
    """Decode base64. Raises ValueError if the text is not base64 or the result does not have `length` bytes."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("not base64") from None
    if len(raw) != length or _text(raw) != text:  # a key has one spelling only
        raise ValueError(f"not {length} bytes")
    return raw
