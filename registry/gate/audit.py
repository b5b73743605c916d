"""Audits a ledger: compares it with the digests, verdicts, approvals and SBOMs that it names, and checks signatures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from pydantic import ValidationError

from limbeck.registry.core import signing
from limbeck.registry.core.digest import text_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.signing import Signature
from limbeck.registry.gate.approvals import APPROVAL_TAG_PREFIX
from limbeck.registry.ledger import log
from limbeck.registry.ledger.chain import Ledger
from limbeck.registry.ledger.lock import alias_lock
from limbeck.registry.mlflow import identity
from limbeck.registry.mlflow.listing import list_versions
from limbeck.registry.mlflow.store import Store
from limbeck.registry.mlflow.versions import TAG_PREFIX
from limbeck.registry.provenance.attestation import SBOM_TAG_PREFIX
from limbeck.registry.records import Approval, LedgerEntry, Verdict


def audit_ledger(store: Store, name: str) -> Ledger:
    """The ledger of a model, whose `problems` include those of the versions that it names. Reads them in one query."""
    ledger = log.read_ledger(store, name)
    tags: dict[int, Mapping[str, str]] = {}
    if ledger.entries:
        tags = {each.version: each.tags for each in list_versions(store.client, store.tracking_uri, name)}
    problems: list[str] = []
    for entry in ledger.entries:
        problems += _version_problems(entry, tags.get(entry.to_version or 0))
    problems += _signature_problems(ledger.entries)
    return replace(ledger, audit_problems=tuple(dict.fromkeys(problems)))


def adopt_problems(store: Store, name: str, *, who: str | None = None, reason: str) -> list[LedgerEntry]:
    """Accept all problems of a ledger by entries that record them. They are not reported again and block nothing.

    Returns:
        An entry for each alias that was moved through MLflow itself; without such an alias, one for the other problems.

    Raises:
        BadInput: no reason, no such model.
    """
    if not reason.strip():
        raise BadInput("--adopt needs a reason", fix="give one: --reason ...")
    who = who or identity.current_user(store.tracking_uri)
    log.read_ledger(store, name)  # raises for an unknown name, before there is a lock file for it
    with alias_lock(name):
        log.finish_pending_moves(store, name, who=who)
        ledger = audit_ledger(store, name)
        problems = ledger.problems()
        if not problems:
            return []
        aliases = sorted(
            {entry.alias for entry in ledger.entries} | ledger.applied_marks.keys() | ledger.aliases.keys()
        )
        move_problems = {alias: ledger.external_move_problem(alias) for alias in aliases}
        moved = [alias for alias in aliases if move_problems[alias] is not None]
        other_problems = [problem for problem in problems if problem not in move_problems.values()]
        entries = []
        for alias in moved or aliases[:1] or ["production"]:
            entry = log.adopt_alias(store, name, alias, who=who, reason=reason, extra_problems=other_problems)
            other_problems = []  # the first entry has them
            entries.append(entry)
        return [entry for entry in entries if entry]


def _signature_problems(entries: Sequence[LedgerEntry]) -> Iterator[str]:
    """The entries without the signature of a trusted key; none if no trusted keys are configured."""
    trusted = signing.read_trusted_keys()
    if trusted is None:
        return
    for entry in entries:
        signed_bytes = signing.LEDGER_DOMAIN + entry.hash.encode()
        signature = Signature(entry.key or "", entry.signature or "")
        if entry.signature is None:
            yield f"entry {entry.sequence} is not signed"
        elif signature.key not in trusted:
            yield f"entry {entry.sequence} is signed by a key that is not trusted: {signature.key}"
        elif not signing.verify_signature(signed_bytes, signature, signature.key):
            yield f"entry {entry.sequence} is not what the key {signature.key} has signed"


def _version_problems(entry: LedgerEntry, tags: Mapping[str, str] | None) -> Iterator[str]:
    """The records that an entry names and its version does not have any more. Empty if the version was deleted.

    An alias that pointed at a deleted version is reported by `Ledger.problems`.
    """
    if tags is None or entry.action == "protect":
        return
    subject = f"version {entry.to_version}, which entry {entry.sequence} is about"
    current_digest = tags.get(TAG_PREFIX + "digest", "none")
    if entry.artifact and entry.artifact != current_digest:
        yield f"the digest of {subject}, was {entry.artifact[:12]} and is {current_digest[:12]}"
    records: list[tuple[str, str, str | None, Callable[[str], str]]] = [
        ("verdict", f"{TAG_PREFIX}verdict.", entry.verdict, lambda text: Verdict.model_validate_json(text).digest()),
        ("SBOM", SBOM_TAG_PREFIX, entry.sbom, text_digest),
    ]
    records += [
        ("approval", APPROVAL_TAG_PREFIX, digest, lambda text: Approval.model_validate_json(text).digest())
        for digest in entry.approvals
    ]
    for kind, prefix, digest, compute_digest in records:
        if digest is None:
            continue
        text = tags.get(prefix + digest[:16])
        if text is None:
            yield f"the {kind} {digest[:12]} of {subject}, is gone"
            continue
        current = _digest_or_unreadable(text, compute_digest)
        if current != digest:
            yield f"the {kind} {digest[:12]} of {subject}, was changed: it is {current[:12]}"


def _digest_or_unreadable(text: str, compute_digest: Callable[[str], str]) -> str:
    try:
        return compute_digest(text)
    except ValidationError:
        return "unreadable"
