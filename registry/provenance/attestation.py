"""SBOMs stored with their versions, and signed if a key is configured.

An SBOM is a tag of the model version, and each signature another tag. The tag's key has the digest of the SBOM; the
ledger's entry of a promotion has it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from limbeck.registry.core import signing
from limbeck.registry.core.digest import text_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.signing import Signature
from limbeck.registry.ledger import log
from limbeck.registry.mlflow.store import Store
from limbeck.registry.mlflow.versions import TAG_PREFIX
from limbeck.registry.provenance import cyclonedx
from limbeck.registry.provenance.sbom import Sbom, check_sbom_subject
from limbeck.registry.records import Version

SBOM_TAG_PREFIX, SIGNATURE_TAG_PREFIX = TAG_PREFIX + "sbom.", TAG_PREFIX + "sbom-signature."
MAX_TAG_LENGTH = 100_000  # characters of a tag in MLflow


def sbom_json(store: Store, version: Version) -> dict[str, Any]:
    """The SBOM of a version as CycloneDX 1.6 JSON. Verifies the version's files; raises DamagedArtifact."""
    return cyclonedx.cyclonedx_document(store, version)


def build_sbom(store: Store, version: Version) -> Sbom:
    """The SBOM of a version as text; neither stored nor signed."""
    return Sbom(json.dumps(sbom_json(store, version), indent=1, ensure_ascii=False) + "\n")


def attest(store: Store, version: Version) -> str:
    """Store a version's SBOM with it, signed if a key is configured. Returns its digest.

    Idempotent: the same records give the same SBOM. A stored SBOM without a signature is signed now.

    Raises:
        DamagedArtifact: the version's files are not those recorded.
        BadInput: a key that cannot be used, or more files than fit into an SBOM; nothing is stored then.
    """
    sbom = build_sbom(store, version)
    if len(sbom.text) > MAX_TAG_LENGTH:
        raise BadInput(f"{version.ref}: its SBOM has {len(sbom.text):,} characters, at most {MAX_TAG_LENGTH:,} fit")
    signature = signing.sign(sbom.signed_bytes)  # first, so that nothing is stored if the key cannot be used
    if find_sbom(store, version, sbom.digest) is None:
        _set_tag(store, version, SBOM_TAG_PREFIX + sbom.digest[:16], sbom.text)
    if signature is not None:
        _store_signature(store, version, sbom, signature)
    return sbom.digest


def sign_sbom(store: Store, version: Version, sbom: Sbom) -> Sbom:
    """A stored SBOM with the signature of the configured key, which is stored too; unchanged without a key.

    Raises DamagedArtifact if the SBOM is not of the version's exact files.
    """
    store.artifacts.verified_folder(version)
    check_sbom_subject(sbom, version.digest, version.ref)
    signature = signing.sign(sbom.signed_bytes)
    if signature is None:
        return sbom
    _store_signature(store, version, sbom, signature)
    others = tuple(each for each in sbom.signatures if each.key != signature.key)
    return sbom._replace(signatures=(*others, signature))


def _store_signature(store: Store, version: Version, sbom: Sbom, signature: Signature) -> None:
    key = f"{SIGNATURE_TAG_PREFIX}{sbom.digest[:16]}.{text_digest(signature.key)[:16]}"
    _set_tag(store, version, key, json.dumps(signature._asdict()))


def find_sbom(store: Store, version: Version, digest: str | None = None) -> Sbom | None:
    """The stored SBOM of a version with this digest, else the newest; None if there is none.

    Raises DamagedArtifact if it was changed.
    """
    tags = store.client.get_model_version(version.name, str(version.version)).tags
    found: list[tuple[str, Sbom]] = []  # with their times
    for key, text in tags.items():
        if not key.startswith(SBOM_TAG_PREFIX) or (digest and key != SBOM_TAG_PREFIX + digest[:16]):
            continue
        short_digest = key.removeprefix(SBOM_TAG_PREFIX)
        try:
            time = json.loads(text)["metadata"]["timestamp"]
            sbom = Sbom(text, _stored_signatures(tags, short_digest))
        except (ValueError, KeyError, TypeError):
            raise DamagedArtifact(f"the SBOM of {version.ref}", ["it cannot be read"]) from None
        if not sbom.digest.startswith(short_digest) or (digest and sbom.digest != digest):
            raise DamagedArtifact(f"the SBOM of {version.ref}", ["it is not what was recorded"])
        found.append((time, sbom))
    return max(found, key=lambda each: each[0])[1] if found else None


def _stored_signatures(tags: Mapping[str, str], short_digest: str) -> tuple[Signature, ...]:
    prefix = f"{SIGNATURE_TAG_PREFIX}{short_digest}."
    fields = [json.loads(value) for key, value in tags.items() if key.startswith(prefix)]
    return tuple(Signature(each["key"], each["signature"]) for each in fields)


def sbom_of_ref(store: Store, ref: str) -> Sbom | None:
    """The SBOM of `NAME/VERSION` or `NAME@ALIAS`; of an alias the one that its promotion recorded; None without one.

    Raises DamagedArtifact if it was changed, or is gone after a promotion.
    """
    version = store.get(ref)
    _, _, alias = ref.partition("@")
    last = log.read_ledger(store, version.name).last_move(alias) if alias else None
    if last is None or last.sbom is None or last.to_version != version.version:
        return find_sbom(store, version)
    found = find_sbom(store, version, last.sbom)
    if found is None:
        raise DamagedArtifact(
            f"the SBOM of {version.ref}",
            [f"by the ledger, {ref} was promoted with {last.sbom[:12]}, which is gone"],
        )
    return found


def _set_tag(store: Store, version: Version, key: str, value: str) -> None:
    store.client.set_model_version_tag(version.name, str(version.version), key, value)
