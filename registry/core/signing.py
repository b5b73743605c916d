"""Signatures of ed25519: who vouches for a bill of materials, an approval or a move.

The private key is the PEM file that `LIMBECK_SIGNING_KEY` names (`limbeck keys new FILE` makes one); where it is not
set, nothing is signed. Whom to believe is in the file that `LIMBECK_TRUSTED_KEYS` names, a key and a name a line:

    # KEY, 44 characters of base64               NAME
    GjTVLSn2Jyqg0uNHzrw7qgZdCzZfFtg8nLUkA7vMLRg= ada@example.org

What is signed begins with its kind, so that a signature of one kind of thing cannot pass for one of another. A
serving host needs nothing of this but the standard library, and `cryptography` only where it is told whom to trust.
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
# What may be signed, as the first line of what is signed.
SBOM_DOMAIN, APPROVAL_DOMAIN, LEDGER_DOMAIN = b"limbeck-sbom-v1\n", b"limbeck-approval-v1\n", b"limbeck-ledger-v1\n"
KEY_BYTES, SIGNATURE_BYTES = 32, 64


class Signature(NamedTuple):
    """A signature and the public key that it can be checked with."""

    key: str  # raw public key, base64
    signature: str  # base64


def sign(data: bytes) -> Signature | None:
    """Sign with the key that is configured; None where none is.

    Args:
        data: begins with its kind: `SBOM`, `APPROVAL` or `LEDGER`.

    Raises:
        BadInput: a key file that is missing, that others may read, or that holds no such key.
    """
    if not data.startswith((SBOM_DOMAIN, APPROVAL_DOMAIN, LEDGER_DOMAIN)):
        raise ValueError("what is signed begins with its kind")
    file = os.environ.get(KEY_FILE_VARIABLE)
    if not file:
        return None
    private = load_private_key(Path(file))
    return Signature(public_key(private), _text(private.sign(data)))


def verify_signature(data: bytes, signature: Signature, key: str) -> bool:
    """Whether `signature` is one over `data` by the public key `key` (base64)."""
    try:
        from cryptography.exceptions import InvalidSignature
    except ModuleNotFoundError:
        raise BadInput(
            f"{TRUSTED_KEYS_VARIABLE} is set, and cryptography, which checks signatures, is not installed",
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
    """Public key, base64 -> the name of whose it is; None where `LIMBECK_TRUSTED_KEYS` is not set.

    Raises BadInput, with the line, for a file that is missing or that holds something else.
    """
    file = os.environ.get(TRUSTED_KEYS_VARIABLE)
    if not file:
        return None
    form = "each line is a key and a name, as `limbeck keys show` prints them"
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise BadInput(f"{TRUSTED_KEYS_VARIABLE} names {file}, which cannot be read: {why}", fix=form) from None
    keys = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, _, name = line.strip().partition(" ")
        try:
            _bytes(key, KEY_BYTES)
        except ValueError:
            raise BadInput(f"{file}:{number}: no public key of ed25519", fix=form) from None
        if not name.strip():
            raise BadInput(f"{file}:{number}: the key has no name", fix=form)
        keys[key] = name.strip()
    if not keys:
        raise BadInput(f"{file}, which {TRUSTED_KEYS_VARIABLE} names, has no key", fix=form)
    return keys


def create_key(file: Path) -> str:
    """Make a private key in `file`, for its owner's eyes alone. Returns the public key, base64.

    Raises BadInput where `file` is there already or cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        # Never readable by others, not for a moment; and never over a key that is there.
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as written:
            written.write(pem)
    except FileExistsError:
        raise BadInput(f"{file} is there already", fix="choose another name; a key is never overwritten") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error.strerror}") from None
    return public_key(private)


def load_private_key(file: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file. Raises BadInput, also where others than its owner may read it."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    make = f"make one: limbeck keys new {file}"
    try:
        mode, pem = file.stat().st_mode, file.read_bytes()
    except OSError as error:
        raise BadInput(f"the signing key {file} cannot be read: {error.strerror}", fix=make) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadInput(f"others may read the signing key {file}", fix=f"make it yours alone: chmod 600 {file}")
    try:
        private = load_pem_private_key(pem, password=None)
    except TypeError:
        raise BadInput(
            f"the signing key {file} is encrypted", fix=f"decrypt it: openssl pkey -in {file} -out FILE; chmod 600 FILE"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise BadInput(f"{file} holds no private key in PEM", fix=make) from None
    if not isinstance(private, Ed25519PrivateKey):
        raise BadInput(f"the key in {file} is none of ed25519", fix=make)
    return private


def public_key(private: Ed25519PrivateKey) -> str:
    """The public key of a private one, base64."""
    return _text(private.public_key().public_bytes_raw())


def _public(key: str) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(_bytes(key, KEY_BYTES))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str, length: int) -> bytes:
    """The bytes that base64 says. Raises ValueError where it is none, or not of that length."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("no base64") from None
    if len(raw) != length or _text(raw) != text:  # one key has one spelling
        raise ValueError("of another length")
    return raw
