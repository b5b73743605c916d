"""The ledger of a registered model as it was read: its entries, and what is wrong with them. It asks MLflow nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pydantic import ValidationError

from limbeck.registry.core.digest import json_digest, text_digest
from limbeck.registry.core.errors import Refused
from limbeck.registry.core.terminal import indent_lines
from limbeck.registry.ledger.anchor import Anchor
from limbeck.registry.policy import stored
from limbeck.registry.records import LedgerEntry

ENTRY_TAG_PREFIX = "limbeck.ledger."
APPLIED_TAG_PREFIX = "limbeck.applied."
MOVING_MARK_PREFIX = "moving:"  # before the hash in a mark: the alias is being moved
UNHASHED = ("hash", "key", "signature")


def compute_entry_hash(entry: LedgerEntry) -> str:
    """The hash that an entry must have."""
    return json_digest({name: value for name, value in entry.model_dump(mode="json").items() if name not in UNHASHED})


def entry_tag(number: int, digest: str) -> str:
    """The tag that holds the entry with a sequence number and a hash."""
    return f"{ENTRY_TAG_PREFIX}{number:06d}.{digest[:16]}"


def describe_version(number: int | None) -> str:
    """`version 3` or `no version`."""
    return "no version" if number is None else f"version {number}"


def problem_id(problem: str) -> str:
    """The name of a problem in an `adopt` entry."""
    return text_digest(problem)[:12]


class _EntryTags(NamedTuple):
    """The tags of entries, sorted out."""

    entries: list[LedgerEntry]  # by sequence number
    problems: list[str]
    strays: list[str]  # tags of entries that the anchor does not know, and that cannot become the next one


@dataclass(frozen=True)
class Ledger:
    """All alias moves of a registered model."""

    name: str
    tags: Mapping[str, str]  # of the registered model
    aliases: Mapping[str, int]  # alias -> version number in MLflow now
    anchor: Anchor | None  # None: no entry was ever written
    audit_problems: tuple[str, ...] = ()  # with the records that entries name, see limbeck.registry.gate.audit

    def disagreement(self, problems: Iterable[str], fix: str) -> Refused:
        """The error that refuses a command because of these problems."""
        lines = [f"the ledger of {self.name} and its aliases do not agree:", *indent_lines(problems)]
        return Refused("\n".join(lines), fix=fix)

    @property
    def anchored_hashes(self) -> dict[int, str]:
        """Sequence number -> hash of every entry ever written."""
        return self.anchor.hashes if self.anchor else {}

    @cached_property
    def _anchored_tags(self) -> set[str]:
        return {entry_tag(number, digest) for number, digest in self.anchored_hashes.items()}

    @cached_property
    def _entry_tags(self) -> _EntryTags:
        entries, problems, strays = [], [], []
        for key in sorted(key for key in self.tags if key.startswith(ENTRY_TAG_PREFIX)):
            place = key.removeprefix(ENTRY_TAG_PREFIX)
            entry = _parse_entry(self.tags[key])
            is_in_place = entry is not None and key == entry_tag(entry.sequence, entry.hash)
            if self.anchored_hashes and key not in self._anchored_tags:
                if entry is None or not (is_in_place and self._can_be_next(entry)):
                    strays.append(key)
                    problems.append(f"the entry {place} was never written to the ledger: the anchor does not know it")
            elif entry is None:
                problems.append(f"the entry {place} cannot be read")
            elif self.anchored_hashes or self.anchor is None or self.anchor.deleted:  # else it is being written
                entries.append(entry)
                if not is_in_place:
                    problems.append(f"the entry {place} is in the place of another")
        return _EntryTags(sorted(entries, key=lambda entry: entry.sequence), problems, strays)

    def _can_be_next(self, entry: LedgerEntry) -> bool:
        return entry.sequence == self.last_sequence + 1 and entry.previous == self.last_hash

    @property
    def entries(self) -> list[LedgerEntry]:
        """The entries by sequence number."""
        return self._entry_tags.entries

    @property
    def stray_tags(self) -> list[str]:
        """Tags of entries that never counted, because another entry took their sequence number."""
        return self._entry_tags.strays

    @property
    def pending_tags(self) -> list[str]:
        """Tags of entries that the anchor does not know: written at this moment, or left by a killed process."""
        return [key for key in self.tags if key.startswith(ENTRY_TAG_PREFIX) and key not in self._anchored_tags]

    @property
    def last_sequence(self) -> int:
        """The highest sequence number ever written, also if its entry is gone; 0 for none."""
        return max(self.anchored_hashes, default=0)

    @property
    def last_hash(self) -> str:
        """The hash that the next entry names as `previous`; "" for none."""
        return self.anchored_hashes.get(self.last_sequence, "")

    @cached_property
    def applied_marks(self) -> dict[str, str]:
        """Alias -> its mark: the hash of the last entry whose move was made, after MOVING_MARK_PREFIX while it is."""
        return {
            key.removeprefix(APPLIED_TAG_PREFIX): mark
            for key, mark in self.tags.items()
            if key.startswith(APPLIED_TAG_PREFIX)
        }

    def moves(self, alias: str) -> list[LedgerEntry]:
        """The entries that moved an alias, or adopted a move."""
        return [entry for entry in self.entries if entry.alias == alias and entry.action != "protect"]

    def last_move(self, alias: str) -> LedgerEntry | None:
        """The last entry that moved an alias; None if none did."""
        return next(reversed(self.moves(alias)), None)

    def unfinished_move(self, alias: str) -> LedgerEntry | None:
        """The last entry that moved an alias, if no mark says that the move was made; else None."""
        return next(reversed(self._unfinished_moves(alias)), None)

    def _unfinished_moves(self, alias: str) -> list[LedgerEntry]:
        """The moves that may be half made: those after the marked one, and also that one if its mark says `moving`."""
        moves, mark = self.moves(alias), self.applied_marks.get(alias, "")
        if not moves or mark == moves[-1].hash:
            return []
        marked_hash = mark.removeprefix(MOVING_MARK_PREFIX)
        hashes = [entry.hash for entry in moves]
        marked = hashes.index(marked_hash) if marked_hash in hashes else len(moves) - 2
        return moves[max(marked, 0) if mark.startswith(MOVING_MARK_PREFIX) else marked + 1 :]

    def external_move_problem(self, alias: str) -> str | None:
        """The problem of an alias that was moved through MLflow itself; None if it was not."""
        last = self.last_move(alias)
        now = self.aliases.get(alias)
        expected = {last.to_version if last else None}
        for entry in self._unfinished_moves(alias):
            expected |= {entry.from_version, entry.to_version}
        if now in expected:
            return None
        recorded = f"the ledger says {describe_version(last.to_version)}" if last else "the ledger does not know it"
        return f"{alias} points at {describe_version(now)}, but {recorded}: somebody moved it through MLflow itself"

    def version_history(self, alias: str) -> list[int | None]:
        """The versions that rollbacks of an alias would step back through, the current one last."""
        versions: list[int | None] = []
        for entry in self.entries:
            if entry.adopted:  # something before it is wrong, so rollbacks end here
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
        """Everything that is wrong and was not adopted; empty for a sound ledger.

        Args:
            alias: checks the position of this alias only; None: of all aliases, and also the stored policies and
                the records that entries name.
        """
        adopted = self.adopted_problems
        return [problem for problem in self._all_problems(alias) if problem_id(problem) not in adopted]

    @property
    def adopted_problems(self) -> dict[str, int]:
        """`problem_id` -> sequence number of the entry that adopted the problem."""
        return {problem: entry.sequence for entry in self.entries for problem in entry.adopted}

    def remaining_adopted_problems(self) -> list[str]:
        """The problems that still exist but were adopted, each with the entry that did."""
        adopted = self.adopted_problems
        found = ((problem, adopted.get(problem_id(problem))) for problem in self._all_problems(None))
        return [f"{problem} (adopted in entry {number})" for problem, number in found if number is not None]

    def _all_problems(self, alias: str | None) -> Iterator[str]:
        yield from self._entry_tags.problems
        yield from self._missing_entry_problems()
        yield from self._anchor_problems()
        yield from self._chain_problems()
        known = {entry.alias for entry in self.entries} | self.applied_marks.keys()
        if self.entries or self.anchor:
            known |= self.aliases.keys()
        for each in [alias] if alias else sorted(known):
            if problem := self.external_move_problem(each):
                yield problem
        if alias is None:
            yield from stored.stored_policy_problems(self.tags, self.entries)
            yield from self.audit_problems

    def _missing_entry_problems(self) -> Iterator[str]:
        """Entries that the anchor or a mark knows and that are gone."""
        for number, digest in sorted(self.anchored_hashes.items()):
            if entry_tag(number, digest) not in self.tags:
                yield f"entry {number} ({digest[:12]}) is missing"
        hashes = {entry.hash for entry in self.entries}.union(self.anchored_hashes.values())
        for alias, mark in sorted(self.applied_marks.items()):
            digest = mark.removeprefix(MOVING_MARK_PREFIX)
            if digest not in hashes:
                yield f"the entry {digest[:12]} that last moved {alias} is missing"

    def _anchor_problems(self) -> Iterator[str]:
        """An anchor that was deleted, and entries that name another one."""
        run_id = self.anchor.run_id if self.anchor else None
        if self.anchor and self.anchor.deleted:
            yield f"the MLflow run {run_id}, which anchors the ledger, was deleted"
        for entry in self.entries:
            if entry.anchor != run_id:
                yield f"entry {entry.sequence} is anchored in the run {entry.anchor}, the ledger in {run_id or 'none'}"

    def _chain_problems(self) -> Iterator[str]:
        """Entries that were changed or reordered, or that do not follow from those before."""
        hashes = {entry.sequence: entry.hash for entry in self.entries} | self.anchored_hashes
        versions: dict[str, int | None] = {}  # alias -> where the entries so far put it
        last = 0
        for entry in self.entries:
            number, previous = entry.sequence, hashes.get(entry.sequence - 1)
            if number > last + 1:  # the missing entries may have moved any alias
                versions.clear()
            last = number
            if entry.hash != (computed := compute_entry_hash(entry)):
                yield f"entry {number} was changed: its hash is {entry.hash[:12]}, its fields give {computed[:12]}"
            if entry.name != self.name:
                yield f"entry {number} is of {entry.name}, not of {self.name}"
            if entry.hash != hashes[number]:
                yield f"entry {number} is {entry.hash[:12]}, but the anchor says {hashes[number][:12]}"
            if entry.previous != ("" if number == 1 else previous or entry.previous):
                yield f"entry {number} does not follow the one before"
            if entry.action == "protect":
                continue
            if entry.alias in versions and entry.from_version != versions[entry.alias]:
                was, stated = describe_version(versions[entry.alias]), describe_version(entry.from_version)
                yield f"entry {number} moves {entry.alias} from {stated}, but it was at {was}"
            versions[entry.alias] = entry.to_version


def _parse_entry(value: str) -> LedgerEntry | None:
    try:
        return LedgerEntry.model_validate_json(value)
    except ValidationError:
        return None
