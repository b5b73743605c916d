"""The ledger of alias moves: append-only, chained by hash, kept on the tracking server with the model.

MLflow moves an alias without a trace. So each move is written here first and then made, and a mark says that
it was made. A process killed in between leaves an entry without its mark: `settle` finishes it. An alias that
is not where the last finished entry put it was moved through MLflow itself: that is told, never overwritten.

Entries are tags `limbeck.ledger.SEQUENCE.HASH` of the registered model; the mark is `limbeck.applied.ALIAS`. An
entry counts from the moment that `ledger.anchor` has its hash: MLflow lets each number have one hash, and never
another. Two machines that write at once are so put in order, and what is changed, dropped (the last ones or all,
too), doubled or reordered through MLflow afterwards is found.

Somebody who can write to MLflow's database itself can rewrite tags and anchor together. Against that there are
signatures alone: an entry has one where a key is configured, see `registry.core.signing`, and `limbeck models history`
asks for one of a trusted key where `LIMBECK_TRUSTED_KEYS` names some. Even so the last entries can be dropped by
such a person: what was never seen has no signature to miss.
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
LONGEST_ENTRY = 5000  # characters; what a tag of a registered model holds
TRIES = 10  # of what another machine comes in between of


class ConcurrentMove(Refused):
    """Another machine wrote to the ledger since it was read: what was about to be written is not there."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"somebody else moved an alias of {name} at the same moment; nothing was moved here",
            fix=f"look at: limbeck models history {name}; then run the same command again",
        )


def read_ledger(store: Store, name: str) -> Ledger:
    """The ledger of a registered model. Raises BadInput where there is no such model."""
    held = anchor.find_anchor(store, name)
    for _ in range(TRIES):
        try:
            model = store.client.get_registered_model(name)
        except NotFound:
            raise store.not_found_error(name) from None
        aliases = {alias: int(number) for alias, number in model.aliases.items()}
        book = Ledger(name, dict(model.tags), aliases, held)
        # What is not in the anchor may have come into it between the two calls, and its alias may have moved.
        if not book.pending_tags or held == (held := anchor.find_anchor(store, name)):
            return book
    raise LimbeckError(f"others are writing to the ledger of {name} all the time", fix="try again later")


def read_entries(store: Store, name: str) -> list[LedgerEntry]:
    """The entries of a registered model, first to last."""
    return read_ledger(store, name).entries


def append_entry(store: Store, name: str, *, based_on: Ledger | None = None, **fields: Any) -> LedgerEntry:
    """Write an entry at the end; the alias is moved by `apply`, after.

    Args:
        store: where the ledger is.
        name: the registered model.
        based_on: the ledger as it was read, where the entry says what follows from it; None for wherever it ends.
        fields: of LedgerEntry, less `sequence`, `when`, `name`, `previous`, `hash` and `anchor`.

    Raises:
        BadInput: a reason of more than 2,000 characters, or an entry that is too long.
        Overtaken: there is an entry after those of `based_on`.
    """
    if len(fields.get("reason", "")) > LONGEST_REASON:
        raise BadInput(f"the reason has {len(fields['reason'])} characters, at most {LONGEST_REASON} are kept")
    for _ in range(1 if based_on else TRIES):
        book = based_on or read_ledger(store, name)
        run = _ensure_anchored(store, book)
        draft = LedgerEntry(
            sequence=book.last_sequence + 1,
            when=datetime.now(UTC),
            name=name,
            previous=book.last_hash,
            hash="",
            anchor=run,
            **fields,
        )
        entry = _sign_entry(draft.model_copy(update={"hash": compute_entry_hash(draft)}))
        text, key = entry.model_dump_json(), entry_tag(entry.sequence, entry.hash)
        if len(text) > LONGEST_ENTRY:
            raise BadInput(f"the entry has {len(text)} characters, MLflow keeps {LONGEST_ENTRY}", fix="say it shorter")
        store.client.set_registered_model_tag(name, key, text)
        if anchor.claim_sequence_number(store, run, entry.sequence, entry.hash):
            for other in book.pending_tags:  # of a process that was killed before it could enter it
                store.client.delete_registered_model_tag(name, other)
            return entry
        store.client.delete_registered_model_tag(name, key)
    raise ConcurrentMove(name)


def _sign_entry(entry: LedgerEntry) -> LedgerEntry:
    """The entry with a signature over its hash, where a key is configured."""
    made = signing.sign(signing.LEDGER_DOMAIN + entry.hash.encode())
    return entry.model_copy(update={"key": made.key, "signature": made.signature}) if made else entry


def _ensure_anchored(store: Store, ledger_snapshot: Ledger) -> str:
    """The run of the anchor; entries of before there were anchors are entered in it."""
    there = ledger_snapshot.anchor or anchor.ensure_anchor(store, ledger_snapshot.name)
    if not there.hashes and ledger_snapshot.entries:
        anchor.anchor_existing_hashes(
            store, there.run_id, {entry.sequence: entry.hash for entry in reversed(ledger_snapshot.entries)}
        )
    return there.run_id


def apply_entry(store: Store, entry: LedgerEntry) -> None:
    """Move the alias as an entry says, and mark the entry as made.

    On another machine somebody may have finished this entry and written the next meanwhile: then this is its move
    undone, so the ledger is read again, and the last entry is made again. The first mark is for whoever finds this
    process dead in between.
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
    """As `apply`; a move that the server does not let `who` make is taken back by an entry, and the refusal given.

    MLflow asks for more to take an alias away (MANAGE) than to write an entry (EDIT).
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
    """Finish the moves that a killed process left unfinished, and clear what it never entered.

    Where the files that such an entry points at are gone or damaged by now, the alias stays where it is, and
    an entry of `who` says so. Returns the ledger as it is then.
    """
    book = read_ledger(store, name)
    begun = [alias for alias in sorted({entry.alias for entry in book.entries}) if book.unfinished_move(alias)]
    if not (begun or book.stray_tags):
        return book
    for key in book.stray_tags:
        store.client.delete_registered_model_tag(name, key)
    for alias in begun:
        entry = book.unfinished_move(alias)
        if entry is None or book.external_move_problem(alias):
            continue
        if entry.to_version is not None and book.aliases.get(alias) != entry.to_version:
            try:
                store.artifacts.verified_folder(store.get(f"{name}/{entry.to_version}"))
            except (DamagedArtifact, BadInput) as error:
                entry = _append_reversal(store, book, entry, who, error.message)
        apply_or_revert(store, entry, who=who)
        book = read_ledger(store, name)
    return read_ledger(store, name)


def _append_reversal(store: Store, ledger_snapshot: Ledger, entry: LedgerEntry, who: str, why: str) -> LedgerEntry:
    """The entry that leaves an alias where `entry` was about to take it from."""
    return append_entry(
        store,
        entry.name,
        based_on=ledger_snapshot,
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
    """Write an alias into the ledger as MLflow has it, and what else is wrong as it is: later it is not told anew.

    Args:
        extra_problems: further problems that are taken as they are.

    Returns:
        The entry; None where there is nothing to adopt.
    """
    book = read_ledger(store, name)
    moved = book.external_move_problem(alias)
    rest = [problem for problem in [*book.problems(alias), *extra_problems] if problem != moved]
    if moved is None and not rest:
        return None
    last, now = book.last_move(alias), book.aliases.get(alias)
    entry = append_entry(
        store,
        name,
        based_on=book,
        who=who,
        alias=alias,
        action="adopt",
        from_version=last.to_version if last else None,
        to_version=now,
        artifact=_artifact_digest_or_none(store, name, now),
        verdict=None,
        reason=reason,
        adopted=tuple(dict.fromkeys(problem_id(problem) for problem in rest)),
    )
    apply_entry(store, entry)
    return entry


def _artifact_digest_or_none(store: Store, name: str, number: int | None) -> str | None:
    try:
        return store.get(f"{name}/{number}").digest if number is not None else None
    except BadInput:  # deleted, or a version that Limbeck did not register
        return None


def check_alias(alias: str) -> None:
    """Raises BadInput for an alias that MLflow does not take or keeps for itself."""
    if not ALIAS.fullmatch(alias):
        raise BadInput(f"{alias!r} is no alias", fix="use letters, digits, dashes and underscores")
    if RESERVED.fullmatch(alias):
        raise BadInput(f"the alias {alias!r} is reserved by MLflow", fix="use another, such as production")
