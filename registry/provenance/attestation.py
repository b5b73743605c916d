"""Bills of materials, kept with the versions that they are of, and signed where a key is configured.

A bill is a tag of the model version, each signature another; its digest stands in the tag's key and, of a promotion,
in the ledger's entry.
"""

from __future__ import annotations

import json
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
LONGEST = 100_000  # characters that MLflow takes in a tag


def sbom_json(store: Store, version: Version) -> dict[str, Any]:
    """What went into a version, as CycloneDX 1.6 JSON. Its files are verified; raises DamagedArtifact."""
    return cyclonedx.cyclonedx_document(store, version)


def build_sbom(store: Store, version: Version) -> Sbom:
    """The bill of a version as text; neither kept nor signed."""
    return Sbom(json.dumps(sbom_json(store, version), indent=1, ensure_ascii=False) + "\n")


def attest(store: Store, version: Version) -> str:
    """Keep a version's bill of materials with it, signed where a key is configured. Returns its digest.

    Idempotent: one state of the records has one bill. One that was kept without a signature is signed now.

    Raises:
        DamagedArtifact: the version's files are not those recorded.
        BadInput: a key that cannot be used, or more files than a bill has room for; nothing is kept then.
    """
    made = build_sbom(store, version)
    if len(made.text) > LONGEST:
        raise BadInput(f"{version.ref}: its bill of materials has {len(made.text):,} characters, at most {LONGEST:,}")
    signature = signing.sign(made.signed_bytes)  # a key that cannot be used leaves nothing behind
    if find_sbom(store, version, made.digest) is None:
        _tag(store, version, SBOM_TAG_PREFIX + made.digest[:16], made.text)
    _keep(store, version, made, signature)
    return made.digest


def sign_sbom(store: Store, version: Version, sbom: Sbom) -> Sbom:
    """A kept bill with the signature of the key that is configured, if one is; that is kept with it.

    Raises DamagedArtifact where the bill is not of the version's very files.
    """
    store.artifacts.verified_folder(version)
    check_sbom_subject(sbom, version.digest, version.ref)
    signature = signing.sign(sbom.signed_bytes)
    if signature is None:
        return sbom
    _keep(store, version, sbom, signature)
    others = tuple(each for each in sbom.signatures if each.key != signature.key)
    return sbom._replace(signatures=(*others, signature))


def _keep(store: Store, version: Version, sbom: Sbom, signature: Signature | None) -> None:
    if signature is not None:
        key = f"{SIGNATURE_TAG_PREFIX}{sbom.digest[:16]}.{text_digest(signature.key)[:16]}"
        _tag(store, version, key, json.dumps(signature._asdict()))


def find_sbom(store: Store, version: Version, digest: str | None = None) -> Sbom | None:
    """The bill that is kept with a version: that of a digest, else the newest; None where there is none.

    Raises DamagedArtifact for one that was changed.
    """
    tags = store.client.get_model_version(version.name, str(version.version)).tags
    bills = []
    for key, text in tags.items():
        if not key.startswith(SBOM_TAG_PREFIX) or (digest and key != SBOM_TAG_PREFIX + digest[:16]):
            continue
        try:
            short, made = key.removeprefix(SBOM_TAG_PREFIX), json.loads(text)["metadata"]["timestamp"]
            signed = [json.loads(value) for k, value in tags.items() if k.startswith(f"{SIGNATURE_TAG_PREFIX}{short}.")]
            found = Sbom(text, tuple(Signature(each["key"], each["signature"]) for each in signed))
        except (ValueError, KeyError, TypeError):
            raise DamagedArtifact(f"the bill of materials of {version.ref}", ["it cannot be read"]) from None
        if not found.digest.startswith(short) or (digest and found.digest != digest):
            raise DamagedArtifact(f"the bill of materials of {version.ref}", ["it is not what was recorded"])
        bills.append((made, found))
    return max(bills, key=lambda each: each[0])[1] if bills else None


def sbom_of_ref(store: Store, ref: str) -> Sbom | None:
    """The bill of what `NAME/VERSION` or `NAME@ALIAS` means; of an alias the one that its promotion wrote down.

    Raises DamagedArtifact where that one is changed or gone.
    """
    version = store.get(ref)
    _, _, alias = ref.partition("@")
    last = log.read_ledger(store, version.name).last_move(alias) if alias else None
    if last is None or last.sbom is None or last.to_version != version.version:
        return find_sbom(store, version)
    found = find_sbom(store, version, last.sbom)
    if found is None:
        raise DamagedArtifact(
            f"the bill of materials of {version.ref}",
            [f"the ledger says that {ref} was promoted with {last.sbom[:12]}, which is gone"],
        )
    return found


def _tag(store: Store, version: Version, key: str, value: str) -> None:
    store.client.set_model_version_tag(version.name, str(version.version), key, value)
