"""What the ledger of a registered model says, and what is wrong with it: without asking MLflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from limbeck.registry.core.digest import json_digest, text_digest
from limbeck.registry.ledger.anchor import Anchor
from limbeck.registry.policy import stored
from limbeck.registry.records import LedgerEntry

ENTRY_TAG_PREFIX = "limbeck.ledger."
APPLIED_TAG_PREFIX = "limbeck.applied."
MOVING_MARK_PREFIX = "moving:"  # before the hash in a mark: the alias is just being moved
UNHASHED = ("hash", "key", "signature")


def compute_entry_hash(entry: LedgerEntry) -> str:
    """The hash that an entry has to have."""
    return json_digest({name: value for name, value in entry.model_dump(mode="json").items() if name not in UNHASHED})


def entry_tag(number: int, digest: str) -> str:
    """The tag that holds the entry of a number and a hash."""
    return f"{ENTRY_TAG_PREFIX}{number:06d}.{digest[:16]}"


def describe_version(number: int | None) -> str:
    """`version 3` or `no version`."""
    return "no version" if number is None else f"version {number}"


def problem_id(problem: str) -> str:
    """What an `adopt` entry calls a problem."""
    return text_digest(problem)[:12]


@dataclass(frozen=True)
class Ledger:
    """All that is known of a registered model's alias moves."""

    name: str
    tags: Mapping[str, str]  # of the registered model
    aliases: Mapping[str, int]  # where MLflow has them now
    anchor: Anchor | None  # None: of before there were anchors, or nothing was ever entered
    audit_problems: tuple[str, ...] = ()  # what is wrong with what the entries name, see limbeck.registry.gate.audit

    @property
    def anchored_hashes(self) -> dict[int, str]:
        """Sequence number -> hash, of all that was ever entered; empty for a ledger of before there were anchors."""
        return self.anchor.hashes if self.anchor else {}

    @cached_property
    def _sorted_tags(self) -> tuple[list[LedgerEntry], list[str], list[str]]:
        """`entries`, what is wrong with their tags, and `strays`."""
        entries, misplaced, strays = [], [], []
        places = {entry_tag(number, digest) for number, digest in self.anchored_hashes.items()}
        for key in sorted(key for key in self.tags if key.startswith(ENTRY_TAG_PREFIX)):
            place = key.removeprefix(ENTRY_TAG_PREFIX)
            entry = _parse_entry(self.tags[key])
            fits = entry is not None and key == entry_tag(entry.sequence, entry.hash)
            if self.anchored_hashes and key not in places:
                if not (fits and entry.sequence == self.last_sequence + 1 and entry.previous == self.last_hash):  # type: ignore[union-attr]
                    strays.append(key)
                    misplaced.append(f"the entry {place} was never entered: the anchor does not know it")
            elif entry is None:
                misplaced.append(f"the entry {place} cannot be read")
            elif (
                self.anchored_hashes or self.anchor is None or entry.anchor is None
            ):  # else it was about to be entered, as the first one
                entries.append(entry)
                if not fits:
                    misplaced.append(f"the entry {place} is in the place of another")
        return sorted(entries, key=lambda entry: entry.sequence), misplaced, strays

    @property
    def entries(self) -> list[LedgerEntry]:
        """By sequence."""
        return self._sorted_tags[0]

    @property
    def stray_tags(self) -> list[str]:
        """Tags of entries that were never entered, since another came before."""
        return self._sorted_tags[2]

    @property
    def pending_tags(self) -> list[str]:
        """Tags of entries that the anchor does not know; they may have been entered just now, or never will be."""
        places = {entry_tag(number, digest) for number, digest in self.anchored_hashes.items()}
        places |= set() if self.anchored_hashes else {entry_tag(entry.sequence, entry.hash) for entry in self.entries}
        return [key for key in self.tags if key.startswith(ENTRY_TAG_PREFIX) and key not in places]

    @property
    def last_sequence(self) -> int:
        """The highest number of an entry, be it there or missing."""
        return (
            max(self.anchored_hashes)
            if self.anchored_hashes
            else max((entry.sequence for entry in self.entries), default=0)
        )

    @property
    def last_hash(self) -> str:
        """The hash that the next entry follows."""
        return (
            self.anchored_hashes[self.last_sequence]
            if self.anchored_hashes
            else self.entries[-1].hash
            if self.entries
            else ""
        )

    @cached_property
    def applied_marks(self) -> dict[str, str]:
        """Alias -> hash of the last entry whose move was made, or `MOVING` and that of one that is being made."""
        return {
            key.removeprefix(APPLIED_TAG_PREFIX): mark
            for key, mark in self.tags.items()
            if key.startswith(APPLIED_TAG_PREFIX)
        }

    def moves(self, alias: str) -> list[LedgerEntry]:
        """The entries that moved an alias, or told that it was moved."""
        return [entry for entry in self.entries if entry.alias == alias and entry.action != "protect"]

    def last_move(self, alias: str) -> LedgerEntry | None:
        """The last entry that moved an alias."""
        return next(reversed(self.moves(alias)), None)

    def unfinished_move(self, alias: str) -> LedgerEntry | None:
        """The last entry that moved an alias, where its move was not marked as made."""
        return next(reversed(self._unfinished_moves(alias)), None)

    def _unfinished_moves(self, alias: str) -> list[LedgerEntry]:
        """The moves that may be half made: those after the marked one, and that one too while it is being made."""
        moves, mark = self.moves(alias), self.applied_marks.get(alias, "")
        if not moves or mark == moves[-1].hash:
            return []
        marked = mark.removeprefix(MOVING_MARK_PREFIX)
        place = next((p for p, entry in enumerate(moves) if entry.hash == marked), len(moves) - 2)
        return moves[max(place, 0) if mark.startswith(MOVING_MARK_PREFIX) else place + 1 :]

    def external_move_problem(self, alias: str) -> str | None:
        """What to say of an alias that was moved through MLflow itself; None where it was not."""
        last = self.last_move(alias)
        now = self.aliases.get(alias)
        expected = {last.to_version if last else None}
        for entry in self._unfinished_moves(alias):
            expected |= {entry.from_version, entry.to_version}
        if now in expected:
            return None
        said = f"the ledger says {describe_version(last.to_version)}" if last else "the ledger knows nothing of it"
        return f"{alias} points at {describe_version(now)}, but {said}: somebody moved it through MLflow itself"

    def version_history(self, alias: str) -> list[int | None]:
        """The versions an alias would step back through, the present one last; promotions add, rollbacks take."""
        versions: list[int | None] = []
        for entry in self.entries:
            if entry.adopted:  # something is wrong before it: nobody knows the way back over that
                versions = versions[-1:]
            if entry.alias != alias or entry.action == "protect":
                continue
            if entry.action == "rollback":
                versions = versions[:-1]
            elif entry.adopted:
                versions = [entry.to_version]
            else:
                versions.append(entry.to_version)
        return versions

    def problems(self, alias: str | None = None) -> list[str]:
        """Everything that is not as it should be and was not adopted; empty for a sound ledger.

        Args:
            alias: leave out where the other aliases are; None for all that the ledger or MLflow knows.
        """
        adopted = self.adopted_problems
        return [problem for problem in self._all_problems(alias) if problem_id(problem) not in adopted]

    @property
    def adopted_problems(self) -> dict[str, int]:
        """`name_of` a problem -> number of the entry that adopted it."""
        return {problem: entry.sequence for entry in self.entries for problem in entry.adopted}

    def remaining_adopted_problems(self) -> list[str]:
        """The problems that are left, but were adopted: with the entry that did."""
        found = ((problem, self.adopted_problems.get(problem_id(problem))) for problem in self._all_problems(None))
        return [f"{problem} (adopted in entry {number})" for problem, number in found if number is not None]

    def _all_problems(self, alias: str | None) -> Iterator[str]:
        yield from self._sorted_tags[1]
        yield from self._missing_entry_problems()
        yield from self._chain_problems()
        known = {entry.alias for entry in self.entries} | self.applied_marks.keys()
        if self.entries or self.anchor:
            known |= self.aliases.keys()
        for other in [alias] if alias else sorted(known):
            if moved := self.external_move_problem(other):
                yield moved
        if alias is None:
            yield from stored.stored_policy_problems(self.tags, self.entries)
            yield from self.audit_problems

    def _missing_entry_problems(self) -> Iterator[str]:
        """Entries that the anchor or a mark knows and that are not there."""
        numbers = Counter(entry.sequence for entry in self.entries)
        for number in range(1, self.last_sequence + 1):
            digest = self.anchored_hashes.get(number)
            if (digest is None and number not in numbers) or (digest and entry_tag(number, digest) not in self.tags):
                yield f"entry {number}{f' ({digest[:12]})' if digest else ''} is missing"
            if not digest and numbers[number] > 1:
                yield f"{numbers[number]} entries have the number {number}"
        hashes = {entry.hash for entry in self.entries}.union(self.anchored_hashes.values())
        for alias, mark in sorted(self.applied_marks.items()):
            if (mark := mark.removeprefix(MOVING_MARK_PREFIX)) not in hashes:
                yield f"the entry {mark[:12]} that last moved {alias} is missing"
        if self.anchor and self.anchor.deleted:
            yield f"the MLflow run {self.anchor.run_id}, which holds the ledger in place, was deleted"
        for entry in self.entries:
            if entry.anchor and entry.anchor != (self.anchor and self.anchor.run_id):
                yield f"entry {entry.sequence} is held in place by the run {entry.anchor}, the ledger by another"

    def _chain_problems(self) -> Iterator[str]:
        """Entries that were changed or reordered, or that do not fit those before."""
        hashes = {entry.sequence: entry.hash for entry in self.entries} | self.anchored_hashes
        versions: dict[str, int | None] = {}
        last = 0
        for entry in self.entries:
            number, before = entry.sequence, hashes.get(entry.sequence - 1)
            if number > last + 1:  # what is missing may have moved anything
                versions.clear()
            last = number
            if entry.hash != (given := compute_entry_hash(entry)):
                yield f"entry {number} was changed: its hash is {entry.hash[:12]}, its fields give {given[:12]}"
            if entry.name != self.name:
                yield f"entry {number} is of {entry.name}, not of {self.name}"
            if entry.hash != hashes[number]:
                yield f"entry {number} is {entry.hash[:12]}, but {hashes[number][:12]} was entered"
            if entry.previous != ("" if number == 1 else before or entry.previous):
                yield f"entry {number} does not follow the one before"
            if entry.action == "protect":
                continue
            if entry.alias in versions and entry.from_version != versions[entry.alias]:
                was, said = describe_version(versions[entry.alias]), describe_version(entry.from_version)
                yield f"entry {number} moves {entry.alias} from {said}, where it was at {was}"
            versions[entry.alias] = entry.to_version


def _parse_entry(value: str) -> LedgerEntry | None:
    try:
        return LedgerEntry.model_validate_json(value)
    except ValidationError:
        return None
