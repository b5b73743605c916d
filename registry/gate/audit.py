"""The ledger held against what it speaks of: the versions' digests, verdicts, approvals, bills; and its signatures."""

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
    """As `ledger.read`, and its `problems` tell of the versions as well; with one query for all of them."""
    book = log.read_ledger(store, name)
    tags = (
        {each.version: each.tags for each in list_versions(store.client, store.tracking_uri, name)}
        if book.entries
        else {}
    )
    beyond = (
        problem for entry in book.entries for problem in _version_problems(entry, tags.get(entry.to_version or 0))
    )
    return replace(book, audit_problems=tuple(dict.fromkeys([*beyond, *_signature_problems(book.entries)])))


def adopt_problems(store: Store, name: str, *, who: str | None = None, reason: str) -> list[LedgerEntry]:
    """Write all that is wrong with a ledger into it, as it is: later it is not told anew, and nothing waits for it.

    Returns:
        An entry for each alias that was moved; one for what is wrong besides, where none was.

    Raises:
        BadInput: no reason, no such model.
    """
    if not reason.strip():
        raise BadInput("what is adopted needs a reason", fix="give one: --reason ...")
    who = who or identity.current_user(store.tracking_uri)
    log.read_ledger(store, name)  # no lock for a name that is not there
    with alias_lock(name):
        log.finish_pending_moves(store, name, who=who)
        book = audit_ledger(store, name)
        told = book.problems()
        known = sorted({entry.alias for entry in book.entries} | book.applied_marks.keys() | book.aliases.keys())
        moved = {alias: words for alias in known if (words := book.external_move_problem(alias))}
        rest = [problem for problem in told if problem not in moved.values()]
        aliases = list(moved) or (known or ["production"])[:1] if told else []
        made = []
        for alias in aliases:
            made.append(log.adopt_alias(store, name, alias, who=who, reason=reason, extra_problems=rest))
            rest = []
        return [entry for entry in made if entry]


def _signature_problems(entries: Sequence[LedgerEntry]) -> Iterator[str]:
    """The entries that nobody who is trusted has signed, where it is said whom to trust."""
    trusted = signing.read_trusted_keys()
    for entry in entries if trusted is not None else ():
        data, made = signing.LEDGER_DOMAIN + entry.hash.encode(), Signature(entry.key or "", entry.signature or "")
        if entry.signature is None:
            yield f"entry {entry.sequence} is not signed"
        elif trusted is not None and made.key not in trusted:
            yield f"entry {entry.sequence} is signed by a key that is not trusted: {made.key}"
        elif not signing.verify_signature(data, made, made.key):
            yield f"entry {entry.sequence} is not what the key {made.key} has signed"


def _version_problems(entry: LedgerEntry, tags: Mapping[str, str] | None) -> Iterator[str]:
    """What a version does not have any more of what its entry names; nothing where it was deleted.

    An alias that points at a deleted version is gone with it, and that is told.
    """
    if tags is None or entry.action == "protect":
        return
    where = f"version {entry.to_version}, which entry {entry.sequence} is about"
    if entry.artifact and entry.artifact != (now := tags.get(TAG_PREFIX + "digest", "none")):
        yield f"the digest of {where}, was {entry.artifact[:12]} and is {now[:12]}"
    records: list[tuple[str, str, str | None, Callable[[str], str]]] = [
        ("verdict", f"{TAG_PREFIX}verdict.", entry.verdict, lambda text: Verdict.model_validate_json(text).digest()),
        ("bill of materials", SBOM_TAG_PREFIX, entry.sbom, text_digest),
    ]
    records += [
        ("approval", APPROVAL_TAG_PREFIX, digest, lambda text: Approval.model_validate_json(text).digest())
        for digest in entry.approvals
    ]
    for what, prefix, digest, digest_of in records:
        if digest is None:
            continue
        text = tags.get(prefix + digest[:16])
        if text is None:
            yield f"the {what} {digest[:12]} of {where}, is gone"
        elif (now := _digest_or_unreadable(text, digest_of)) != digest:
            yield f"the {what} {digest[:12]} of {where}, was changed: it is {now[:12]}"


def _digest_or_unreadable(text: str, compute_digest: Callable[[str], str]) -> str:
    try:
        return compute_digest(text)
    except ValidationError:
        return "unreadable"
