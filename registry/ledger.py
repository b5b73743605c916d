"""The ledger of alias moves: append-only, chained by hash, kept on the tracking server with the model.

MLflow moves an alias without a trace. So each move is written here first and then made, and a mark says that
it was made. A process killed in between leaves an entry without its mark: `settle` finishes it. An alias that
is not where the last finished entry put it was moved through MLflow itself: that is told, never overwritten.

Entries are tags `limbeck.ledger.SEQUENCE.HASH` of the registered model; the mark is `limbeck.applied.ALIAS`.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from registry.connection import NotThere
from registry.digest import json_digest
from registry.errors import BadInput, DamagedArtifact, LimbeckError
from registry.records import LedgerEntry, said_by
from registry.store import Store

ENTRY = "limbeck.ledger."
APPLIED = "limbeck.applied."
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)
LONGEST_REASON = 2000  # characters; a tag of a registered model holds 5,000


@dataclass(frozen=True)
class Ledger:
    """All that is known of a registered model's alias moves."""

    name: str
    entries: list[LedgerEntry]  # by sequence
    applied: dict[str, str]  # alias -> hash of the last entry whose move was made
    aliases: dict[str, int]  # where MLflow has them now
    unreadable: list[str]

    def last(self, alias: str) -> LedgerEntry | None:
        """The last entry about an alias."""
        return next((entry for entry in reversed(self.entries) if entry.alias == alias), None)

    def unfinished(self, alias: str) -> LedgerEntry | None:
        """The last entry about an alias, where its move was not marked as made."""
        last = self.last(alias)
        return last if last and self.applied.get(alias) != last.hash else None

    def moved(self, alias: str) -> str | None:
        """What to say of an alias that was moved through MLflow itself; None where it was not."""
        last = self.last(alias)
        now = self.aliases.get(alias)
        expected = {last.to_version if last else None}
        if last and self.unfinished(alias):
            expected.add(last.from_version)
        if now in expected:
            return None
        said = f"the ledger says {_version(last.to_version)}" if last else "the ledger knows nothing of it"
        return f"{alias} points at {_version(now)}, but {said}: somebody moved it through MLflow itself"

    def history(self, alias: str) -> list[int | None]:
        """The versions an alias would step back through, the present one last; promotions add, rollbacks take."""
        versions: list[int | None] = []
        for entry in self.entries:
            if entry.alias != alias:
                continue
            if entry.action == "rollback":
                versions = versions[:-1]
            else:
                versions.append(entry.to_version)
        return versions

    def problems(self, alias: str | None = None) -> list[str]:
        """Everything that is not as it should be; empty for a sound ledger.

        Args:
            alias: leave out where the other aliases are; None for all that the ledger knows.
        """
        problems = self.unreadable + verify(self.entries)
        hashes = {entry.hash for entry in self.entries}
        for other, mark in sorted(self.applied.items()):
            if mark not in hashes:
                problems.append(f"the entry {mark[:12]} that last moved {other} is missing")
        for other in [alias] if alias else sorted({entry.alias for entry in self.entries} | self.applied.keys()):
            if moved := self.moved(other):
                problems.append(moved)
        return problems


def read(store: Store, name: str) -> Ledger:
    """The ledger of a registered model. Raises BadInput where there is no such model."""
    try:
        model = store.client.get_registered_model(name)
    except NotThere:
        raise store.unknown(name) from None
    entries, unreadable, applied = [], [], {}
    for key, value in sorted(model.tags.items()):
        if key.startswith(APPLIED):
            applied[key.removeprefix(APPLIED)] = value
        if not key.startswith(ENTRY):
            continue
        try:
            entry = LedgerEntry.model_validate_json(value)
        except ValidationError:
            unreadable.append(f"the entry {key.removeprefix(ENTRY)} cannot be read")
            continue
        entries.append(entry)
        if key != _key(entry):
            unreadable.append(f"the entry {key.removeprefix(ENTRY)} is in the place of another")
    entries.sort(key=lambda entry: entry.sequence)
    aliases = {alias: int(number) for alias, number in model.aliases.items()}
    return Ledger(name, entries, applied, aliases, unreadable)


def entries(store: Store, name: str) -> list[LedgerEntry]:
    """The entries of a registered model, first to last."""
    return read(store, name).entries


def verify(entries: list[LedgerEntry]) -> list[str]:
    """What is wrong with a chain of entries: changed, dropped, doubled or reordered ones. Empty if nothing."""
    problems = []
    counts = Counter(entry.sequence for entry in entries)
    problems += [f"{count} entries have the number {number}" for number, count in counts.items() if count > 1]
    previous = ""
    versions: dict[str, int | None] = {}
    for place, entry in enumerate(entries, 1):
        if entry.hash != _hash(entry):
            problems.append(f"entry {entry.sequence} was changed: its hash does not fit")
        if entry.sequence != place and entry.sequence not in {n for n, c in counts.items() if c > 1}:
            problems.append(f"entry {entry.sequence} stands in place {place}")
        if entry.previous != previous:
            problems.append(f"entry {entry.sequence} does not follow the one before: something is missing")
        if entry.alias in versions and entry.from_version != versions[entry.alias]:
            was, said = _version(versions[entry.alias]), _version(entry.from_version)
            problems.append(f"entry {entry.sequence} moves {entry.alias} from {said}, where it was at {was}")
        previous = entry.hash
        versions[entry.alias] = entry.to_version
    return problems


def append(store: Store, name: str, **fields: Any) -> LedgerEntry:
    """Write an entry at the end; the alias is moved by `apply`, after.

    Args:
        store: where the ledger is.
        name: the registered model.
        fields: of LedgerEntry, less `sequence`, `when`, `name`, `previous` and `hash`.

    Raises:
        BadInput: a reason of more than 2,000 characters.
    """
    if len(fields.get("reason", "")) > LONGEST_REASON:
        raise BadInput(f"the reason has {len(fields['reason'])} characters, at most {LONGEST_REASON} are kept")
    for _ in range(20):
        last = max(entries(store, name), key=lambda entry: entry.sequence, default=None)
        draft = LedgerEntry(
            sequence=last.sequence + 1 if last else 1,
            when=datetime.now(UTC),
            name=name,
            previous=last.hash if last else "",
            hash="",
            **fields,
        )
        entry = draft.model_copy(update={"hash": _hash(draft)})
        store.client.set_registered_model_tag(name, _key(entry), entry.model_dump_json())
        # Another machine may have written at the same moment: whoever sees the other gives way.
        if [e.sequence for e in entries(store, name)].count(entry.sequence) == 1:
            return entry
        store.client.delete_registered_model_tag(name, _key(entry))
        time.sleep(random.uniform(0.05, 0.5))
    raise LimbeckError(f"others are writing to the ledger of {name} all the time", fix="try again later")


def apply(store: Store, entry: LedgerEntry) -> None:
    """Move the alias as an entry says, and mark the entry as made."""
    if entry.action != "adopt":
        if entry.to_version is None:
            store.client.delete_registered_model_alias(entry.name, entry.alias)
        else:
            store.client.set_registered_model_alias(entry.name, entry.alias, str(entry.to_version))
    store.client.set_registered_model_tag(entry.name, APPLIED + entry.alias, entry.hash)


def settle(store: Store, name: str, *, who: str) -> list[LedgerEntry]:
    """Finish the moves that a killed process left unfinished. Returns the entries that were carried out.

    Where the files that such an entry points at are gone or damaged by now, the alias stays where it is, and
    an entry of `who` says so.
    """
    finished = []
    ledger = read(store, name)
    for alias in sorted({entry.alias for entry in ledger.entries}):
        entry = ledger.unfinished(alias)
        if entry is None or ledger.moved(alias):
            continue
        if entry.to_version is not None and ledger.aliases.get(alias) != entry.to_version:
            try:
                store.folder(store.get(f"{name}/{entry.to_version}"))
            except (DamagedArtifact, BadInput) as error:
                entry = _taken_back(store, entry, who, error.message)
        apply(store, entry)
        finished.append(entry)
    return finished


def _taken_back(store: Store, entry: LedgerEntry, who: str, why: str) -> LedgerEntry:
    """The entry that leaves an alias where `entry` was about to take it from."""
    return append(
        store,
        entry.name,
        who=who,
        alias=entry.alias,
        action="rollback" if entry.action == "promote" else "adopt",
        from_version=entry.to_version,
        to_version=entry.from_version,
        artifact=_digest(store, entry.name, entry.from_version),
        verdict=None,
        reason=f"entry {entry.sequence} was never carried out: {why}"[:LONGEST_REASON],
    )


def adopt(store: Store, name: str, alias: str, *, who: str, reason: str) -> LedgerEntry | None:
    """Write an alias into the ledger as MLflow has it; None where the ledger has it so already."""
    ledger = read(store, name)
    if ledger.moved(alias) is None:
        return None
    last, now = ledger.last(alias), ledger.aliases.get(alias)
    artifact = _digest(store, name, now)
    entry = append(
        store,
        name,
        who=who,
        alias=alias,
        action="adopt",
        from_version=last.to_version if last else None,
        to_version=now,
        artifact=artifact,
        verdict=None,
        reason=reason,
    )
    apply(store, entry)
    return entry


def _digest(store: Store, name: str, number: int | None) -> str | None:
    try:
        return store.get(f"{name}/{number}").digest if number is not None else None
    except BadInput:  # deleted, or a version that Limbeck did not register
        return None


def _hash(entry: LedgerEntry) -> str:
    said = said_by(entry)
    return json_digest({name: value for name, value in said.items() if name != "hash"})


def _key(entry: LedgerEntry) -> str:
    return f"{ENTRY}{entry.sequence:06d}.{entry.hash[:16]}"


def _version(number: int | None) -> str:
    return "no version" if number is None else f"version {number}"


def check_alias(alias: str) -> None:
    """Raises BadInput for an alias that MLflow does not take or keeps for itself."""
    if not ALIAS.fullmatch(alias):
        raise BadInput(f"{alias!r} is no alias", fix="use letters, digits, dashes and underscores")
    if RESERVED.fullmatch(alias):
        raise BadInput(f"the alias {alias!r} is reserved by MLflow", fix="use another, such as production")
