"""Ed25519 keys, signatures and files of trusted keys."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from limbeck.registry.core import signing
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.signing import APPROVAL_DOMAIN, SBOM_DOMAIN, Signature
from tests.conftest import Result

DATA = SBOM_DOMAIN + b"what went in"


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The public key of the configured private key."""
    public = signing.create_key(tmp_path / "key.pem")
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "key.pem"))
    return public


def test_only_the_signed_data_verifies(key: str, tmp_path: Path) -> None:
    made = signing.sign(DATA)
    assert made is not None
    assert made.key == key
    assert signing.verify_signature(DATA, made, key)
    assert not signing.verify_signature(DATA + b".", made, key)
    assert not signing.verify_signature(
        APPROVAL_DOMAIN + DATA.removeprefix(SBOM_DOMAIN), made, key
    )  # one kind is not another
    other = signing.create_key(tmp_path / "other.pem")
    assert not signing.verify_signature(DATA, made, other)
    assert not signing.verify_signature(DATA, made._replace(key=other), other)
    for text in ("", "!!", made.signature[:-4], "é" * 88, made.signature + "\n"):
        assert not signing.verify_signature(DATA, made._replace(signature=text), key)
    assert not signing.verify_signature(DATA, Signature("AAAA", made.signature), "AAAA")


def test_a_signature_equals_that_of_cryptography(key: str, tmp_path: Path) -> None:
    private = load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
    assert isinstance(private, Ed25519PrivateKey)
    made = signing.sign(DATA)
    assert made is not None
    assert signing._bytes(made.signature, 64) == private.sign(DATA)


def test_data_without_a_kind_is_not_signed(key: str) -> None:
    with pytest.raises(ValueError, match="must begin with its kind"):
        signing.sign(b"anything")


def test_nothing_is_signed_without_a_configured_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv(signing.KEY_FILE_VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(signing.KEY_FILE_VARIABLE, value)
        assert signing.sign(DATA) is None


def test_only_the_owner_can_read_a_key_and_it_is_never_overwritten(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        signing.create_key(tmp_path / "key.pem")
    finally:
        os.umask(old)
    before = (tmp_path / "key.pem").read_bytes()
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    with pytest.raises(BadInput, match="exists already"):
        signing.create_key(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").read_bytes() == before
    with pytest.raises(BadInput, match="cannot be written: No such file"):
        signing.create_key(tmp_path / "nowhere" / "key.pem")


def pem(private: Ed25519PrivateKey, password: bytes | None = None) -> bytes:
    hidden = BestAvailableEncryption(password) if password else NoEncryption()
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden)


def elliptic() -> bytes:
    return generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (None, 0o600, "cannot be read: No such file"),
        (b"", 0o600, "holds no private key in PEM"),
        (b"not a key", 0o600, "holds no private key in PEM"),
        (elliptic(), 0o600, "is not an ed25519 key"),
        (pem(Ed25519PrivateKey.generate(), b"secret"), 0o600, "is encrypted"),
        (pem(Ed25519PrivateKey.generate()), 0o640, "others may read"),
        (pem(Ed25519PrivateKey.generate()), 0o604, "others may read"),
    ],
    ids=["missing", "empty", "no key", "another kind", "encrypted", "group", "world"],
)
def test_a_key_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, mode: int, words: str
) -> None:
    file = tmp_path / "key.pem"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(file))
    with pytest.raises(BadInput, match=words) as caught:
        signing.sign(DATA)
    assert str(file) in caught.value.message
    assert caught.value.fix


def test_trusted_keys_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(signing.TRUSTED_KEYS_VARIABLE, raising=False)
    assert signing.read_trusted_keys() is None
    ada, ben = (signing.create_key(tmp_path / f"{name}.pem") for name in "ab")
    file = tmp_path / "trusted"
    file.write_text(f"# ours\n\n{ada} ada@example.org\n  {ben}   Ben of the still \n")
    monkeypatch.setenv(signing.TRUSTED_KEYS_VARIABLE, str(file))
    assert signing.read_trusted_keys() == {ada: "ada@example.org", ben: "Ben of the still"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (b"", "has no key"),
        (b"# nobody\n", "has no key"),
        (b"\nada c3RpbGw=\n", r"trusted:2: not a public ed25519 key"),
        (b"c3RpbGw= ada\n", r"trusted:1: not a public ed25519 key"),
        (b"A" * 43 + b"= \n", r"trusted:1: the key has no name"),
    ],
)
def test_a_file_of_trusted_keys_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "trusted").write_bytes(content)
    monkeypatch.setenv(signing.TRUSTED_KEYS_VARIABLE, str(tmp_path / "trusted"))
    with pytest.raises(BadInput, match=words):
        signing.read_trusted_keys()


def test_commands_create_and_show_keys(
    limbeck_home: Path, limbeck: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = limbeck("keys", "new", "my key.pem", "--name", "ada")
    assert made.code == 0
    assert "LIMBECK_SIGNING_KEY='" in made.err
    (tmp_path / "trusted").write_text(made.out)
    monkeypatch.setenv(signing.TRUSTED_KEYS_VARIABLE, str(tmp_path / "trusted"))
    assert signing.read_trusted_keys() == {made.out.split()[0]: "ada"}
    assert limbeck("keys", "show", "my key.pem", "--name", "ada").out == made.out
    monkeypatch.delenv(signing.KEY_FILE_VARIABLE, raising=False)
    assert "LIMBECK_SIGNING_KEY is not set" in limbeck("keys", "show").err
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, "my key.pem")
    assert limbeck("keys", "show", "--name", "ada").out == made.out
    assert limbeck("keys", "new", "my key.pem").code == 2
    assert not limbeck_home.exists()  # the command needs no state folder


def test_a_host_without_cryptography_learns_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["cryptography"] = sys.modules["cryptography.exceptions"] = None
from limbeck.registry.core import signing
from limbeck.registry.core.errors import BadInput
assert signing.read_trusted_keys() is None
try:
    signing.verify_signature(b"", signing.Signature("", ""), "")
except BadInput as error:
    print(error)
"""
    kept = {"PATH": os.environ["PATH"]}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept, timeout=60)
    assert "cryptography, which verifies signatures, is not installed\n  pip install cryptography" in ran.stdout, (
        ran.stderr
    )
