"""The ledger of alias moves: append-only, chained by hash, kept with the model on the tracking server.

MLflow moves an alias without a trace. So each move is written to the ledger first, then made, and then a mark records
that it was made. A process killed in between leaves an entry without its mark: `finish_pending_moves` makes the move.
An alias that is not where the last finished entry put it was moved through MLflow itself: that is reported and never
overwritten.

Entries are tags `limbeck.ledger.SEQUENCE.HASH` of the registered model; the mark is the tag `limbeck.applied.ALIAS`. An
entry counts as soon as `limbeck.registry.ledger.anchor` has its hash: MLflow accepts one hash for each sequence number
and never changes it. So two machines that write at once get an order, and entries that somebody changes, deletes (also
the last ones, or all), duplicates or reorders through MLflow are found.

Somebody who can write to MLflow's database can change tags and anchor together. Only signatures help against that: an
entry is signed if a key is configured, see `limbeck.registry.core.signing`, and `limbeck models history` requires a
signature by a trusted key if `LIMBECK_TRUSTED_KEYS` is set. Even then such a person can delete the last entries: nobody
misses a signature that was never seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from limbeck.registry.core import signing
from limbeck.registry.core.errors import BadInput, DamagedArtifact, LimbeckError, Refused
from limbeck.registry.ledger import anchor
from limbeck.registry.ledger.chain import (
    APPLIED_TAG_PREFIX,
    MOVING_MARK_PREFIX,
    Ledger,
    compute_entry_hash,
    entry_tag,
    problem_id,
)
from limbeck.registry.mlflow.client import Forbidden, NotFound
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import LedgerEntry

ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)
LONGEST_REASON = 2000  # characters
LONGEST_ENTRY = 5000  # characters; the limit of a registered model's tag
TRIES = 10  # to read or write while other machines write


class ConcurrentMove(Refused):
    """Another machine wrote to the ledger after it was read; the new entry was not written."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"somebody else moved an alias of {name} at the same moment; nothing was moved here",
            fix=f"look at: limbeck models history {name}; then run the same command again",
        )


def read_ledger(store: Store, name: str) -> Ledger:
    """The ledger of a registered model. Raises BadInput if there is no such model."""
    before = anchor.find_anchor(store, name)
    for _ in range(TRIES):
        try:
            model = store.client.get_registered_model(name)
        except NotFound:
            raise store.not_found_error(name) from None
        aliases = {alias: int(number) for alias, number in model.aliases.items()}
        ledger = Ledger(name, dict(model.tags), aliases, before)
        if not ledger.pending_tags:
            return ledger
        # A pending entry may have reached the anchor between the two calls, and its alias may have moved.
        after = anchor.find_anchor(store, name)
        if after == before:
            return ledger
        before = after
    raise LimbeckError(f"other machines keep writing to the ledger of {name}", fix="try again later")


def read_entries(store: Store, name: str) -> list[LedgerEntry]:
    """The entries of a registered model, first to last."""
    return read_ledger(store, name).entries


def append_entry(store: Store, name: str, *, based_on: Ledger | None = None, **fields: Any) -> LedgerEntry:
    """Write an entry at the end. It does not move the alias: `apply_entry` does, afterwards.

    Args:
        store: the store of the model.
        name: the registered model.
        based_on: the ledger that the entry was decided on; None: append it whatever the ledger says by now.
        fields: of LedgerEntry, without `sequence`, `when`, `name`, `previous`, `hash` and `anchor`.

    Raises:
        BadInput: the reason has more than 2,000 characters, the entry is too long, or the anchor is gone.
        ConcurrentMove: there is an entry after those of `based_on`.
    """
    if len(fields.get("reason", "")) > LONGEST_REASON:
        raise BadInput(f"the reason has {len(fields['reason'])} characters, at most {LONGEST_REASON} are kept")
    for _ in range(1 if based_on else TRIES):
        ledger = based_on or read_ledger(store, name)
        run_id = _anchor_run(store, ledger)
        draft = LedgerEntry(
            sequence=ledger.last_sequence + 1,
            when=datetime.now(UTC),
            name=name,
            previous=ledger.last_hash,
            hash="",
            anchor=run_id,
            **fields,
        )
        entry = _sign_entry(draft.model_copy(update={"hash": compute_entry_hash(draft)}))
        text, key = entry.model_dump_json(), entry_tag(entry.sequence, entry.hash)
        if len(text) > LONGEST_ENTRY:
            raise BadInput(
                f"the entry has {len(text)} characters, MLflow keeps {LONGEST_ENTRY}", fix="write a shorter reason"
            )
        store.client.set_registered_model_tag(name, key, text)
        if anchor.claim_sequence_number(store, run_id, entry.sequence, entry.hash):
            for other in ledger.pending_tags:  # of a process that was killed before its entry counted
                store.client.delete_registered_model_tag(name, other)
            return entry
        store.client.delete_registered_model_tag(name, key)
    raise ConcurrentMove(name)


def _sign_entry(entry: LedgerEntry) -> LedgerEntry:
    """The entry with a signature over its hash, if a key is configured."""
    signature = signing.sign(signing.LEDGER_DOMAIN + entry.hash.encode())
    return entry.model_copy(update={"key": signature.key, "signature": signature.signature}) if signature else entry


def _anchor_run(store: Store, ledger: Ledger) -> str:
    """The run of the anchor, created for the first entry. Raises BadInput if entries have lost their anchor."""
    if ledger.anchor:
        return ledger.anchor.run_id
    if ledger.entries:
        raise BadInput(
            f"the ledger of {ledger.name} has entries, but its anchor is gone: "
            f"the MLflow run {ledger.entries[0].anchor}",
            fix="restore it: limbeck doctor --repair",
        )
    return anchor.ensure_anchor(store, ledger.name).run_id


def apply_entry(store: Store, entry: LedgerEntry) -> None:
    """Move the alias to where an entry puts it, and mark the entry as made.

    Another machine may have finished this entry and written the next one meanwhile; then this move undoes that one. So
    the ledger is read again, and its last entry is applied again. The first mark is for the process that finds this
    one killed in between.
    """
    while entry.action != "protect":
        name, alias = entry.name, entry.alias
        store.client.set_registered_model_tag(name, APPLIED_TAG_PREFIX + alias, MOVING_MARK_PREFIX + entry.hash)
        if entry.action != "adopt":
            _set_alias(store, name, alias, entry.to_version)
        store.client.set_registered_model_tag(name, APPLIED_TAG_PREFIX + alias, entry.hash)
        last = read_ledger(store, name).last_move(alias)
        if last is None or last.hash == entry.hash:
            return
        if last.action == "adopt":
            _set_alias(store, name, alias, last.to_version)
        entry = last


def apply_or_revert(store: Store, entry: LedgerEntry, *, who: str) -> Forbidden | None:
    """As `apply_entry`; if the server forbids the move to `who`, a further entry reverts it and the error is returned.

    MLflow demands more for deleting an alias (MANAGE) than for writing an entry (EDIT).
    """
    try:
        apply_entry(store, entry)
    except Forbidden as error:
        apply_entry(store, _append_reversal(store, read_ledger(store, entry.name), entry, who, error.message))
        return error
    return None


def _set_alias(store: Store, name: str, alias: str, number: int | None) -> None:
    if number is None:
        store.client.delete_registered_model_alias(name, alias)
    else:
        store.client.set_registered_model_alias(name, alias, str(number))


def finish_pending_moves(store: Store, name: str, *, who: str) -> Ledger:
    """Make the moves that a killed process left unfinished, and delete the tags of entries that never counted.

    If the files of the version that such a move leads to are gone or damaged by now, the alias stays where it is, and
    an entry of `who` records it. Returns the ledger afterwards.
    """
    ledger = read_ledger(store, name)
    unfinished = [alias for alias in sorted({e.alias for e in ledger.entries}) if ledger.unfinished_move(alias)]
    if not (unfinished or ledger.stray_tags):
        return ledger
    for key in ledger.stray_tags:
        store.client.delete_registered_model_tag(name, key)
    for alias in unfinished:
        entry = ledger.unfinished_move(alias)
        if entry is None or ledger.external_move_problem(alias):
            continue
        if entry.to_version is not None and ledger.aliases.get(alias) != entry.to_version:
            try:
                store.artifacts.verified_folder(store.get(f"{name}/{entry.to_version}"))
            except (DamagedArtifact, BadInput) as error:
                entry = _append_reversal(store, ledger, entry, who, error.message)
        apply_or_revert(store, entry, who=who)
        ledger = read_ledger(store, name)
    return read_ledger(store, name)


def _append_reversal(store: Store, ledger: Ledger, entry: LedgerEntry, who: str, why: str) -> LedgerEntry:
    """Append the entry that leaves an alias where it was before `entry`."""
    return append_entry(
        store,
        entry.name,
        based_on=ledger,
        who=who,
        alias=entry.alias,
        action="rollback" if entry.action == "promote" else "adopt",
        from_version=entry.to_version,
        to_version=entry.from_version,
        artifact=_artifact_digest_or_none(store, entry.name, entry.from_version),
        verdict=None,
        reason=f"entry {entry.sequence} was never carried out: {why}"[:LONGEST_REASON],
    )


def adopt_alias(
    store: Store, name: str, alias: str, *, who: str, reason: str, extra_problems: Sequence[str] = ()
) -> LedgerEntry | None:
    """Write the position of an alias in MLflow into the ledger, and accept its problems: no later check reports them.

    Args:
        extra_problems: further problems to accept.

    Returns:
        The entry; None if there is nothing to adopt.
    """
    ledger = read_ledger(store, name)
    external_move = ledger.external_move_problem(alias)
    others = [problem for problem in [*ledger.problems(alias), *extra_problems] if problem != external_move]
    if external_move is None and not others:
        return None
    last, now = ledger.last_move(alias), ledger.aliases.get(alias)
    entry = append_entry(
        store,
        name,
        based_on=ledger,
        who=who,
        alias=alias,
        action="adopt",
        from_version=last.to_version if last else None,
        to_version=now,
        artifact=_artifact_digest_or_none(store, name, now),
        verdict=None,
        reason=reason,
        adopted=tuple(dict.fromkeys(problem_id(problem) for problem in others)),
    )
    apply_entry(store, entry)
    return entry


def _artifact_digest_or_none(store: Store, name: str, number: int | None) -> str | None:
    try:
        return store.get(f"{name}/{number}").digest if number is not None else None
    except BadInput:  # deleted, or not registered by Limbeck
        return None


def check_alias(alias: str) -> None:
    """Raise BadInput if MLflow does not accept an alias or reserves it."""
    if not ALIAS.fullmatch(alias):
        raise BadInput(f"{alias!r} is not an alias", fix="use letters, digits, dashes and underscores")
    if RESERVED.fullmatch(alias):
        raise BadInput(f"the alias {alias!r} is reserved by MLflow", fix="use another, such as production")
