"""What the gate says of a version and an alias, for the pages that change something. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.registry.core.errors import Refused
from limbeck.registry.gate import approvals, protection
from limbeck.registry.gate.evidence import gather
from limbeck.registry.gate.promotion import Candidate, way_back
from limbeck.registry.gate.rules.judge import judge
from limbeck.registry.ledger import log
from limbeck.registry.ledger.log import Ledger
from limbeck.registry.mlflow.identity import user
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import LedgerEntry, Verdict, Version
from limbeck.web.site import Site

PRODUCTION = "production"
MOST = 30  # candidates that are judged for one page


@dataclass(frozen=True)
class Door:
    """An alias of a model: where it is, what judges for it, who stands before it."""

    name: str
    alias: str
    who: str  # as whom anything is done here
    book: Ledger
    policy: Policy | None  # None: nothing judges, so nothing passes
    protected: bool  # by the policy
    problem: str | None  # why nothing can move

    @property
    def present(self) -> int | None:
        """The version that the alias points at."""
        return self.book.aliases.get(self.alias)

    @property
    def given(self) -> Policy | None:
        """The policy to hand to `limbeck.registry.gate.promotion.promote`: None where the alias has one of its own."""
        return None if self.protected else self.policy

    @property
    def seen(self) -> str:
        """Hash of the last entry about the alias; "" where there is none."""
        last = self.book.last(self.alias)
        return last.hash if last else ""


def door(site: Site, name: str, alias: str) -> Door:
    """Raises BadInput: no such model, an alias that cannot be used."""
    log.check_alias(alias)
    book = log.read(site.store, name)
    problems = book.problems(alias)
    policy, protected = site.policy, False
    try:
        own = protection.policy_in(book, alias)
        policy, protected = own or site.policy, own is not None
    except Refused as refused:
        policy = None
        problems = [refused.message, *problems]
    return Door(name, alias, user(site.store.tracking_uri), book, policy, protected, "\n".join(problems) or None)


def judged(site: Site, door: Door, version: Version) -> Candidate | None:
    """A version with its verdict as of now; None where nothing judges."""
    if door.policy is None:
        return None
    evidence = gather(site.store, version, door.policy, door.alias)
    return Candidate(version, judge(door.policy, evidence), evidence.card)


def candidates(site: Site, door: Door) -> tuple[list[Candidate], int]:
    """The cheapest MOST of the scored ONNX variants, judged, cheapest first; and how many were not judged."""
    variants = [found for found in site.store.found(door.name) if found.version.kind == "onnx"]
    price = {
        found.version: min(card.cost.usd_per_million_tokens if card.cost else float("inf") for card in found.scorecards)
        for found in variants
        if found.scorecards
    }
    cheapest = sorted(price, key=lambda version: (price[version], version.version))[:MOST]
    known = [candidate for version in cheapest if (candidate := judged(site, door, version))]
    return known, len(variants) - len(known)


def asked_about(site: Site, door: Door, version: Version) -> approvals.Asked:
    """What was asked and answered about the version and the alias."""
    return approvals.about(site.store, version, door.alias)


def no_say(door: Door, asked: approvals.Asked) -> str | None:
    """Why an answer of whoever runs this would not count; None where it would, or nothing is asked."""
    return approvals.no_say(asked.version, asked.request, door.policy, door.who) if asked.request else None


def barred(site: Site, door: Door) -> str | None:
    """Why whoever runs this may not override a verdict; None where they may."""
    if door.policy is None:
        return "no policy says who may"
    return protection.barred(door.policy, door.who, site.store, door.name)


def step_back(door: Door) -> tuple[int | None, LedgerEntry | None] | None:
    """The version that a rollback leads to, with the entry that had put the alias there; None: there is none."""
    try:
        target = way_back(door.book, door.alias)
    except Refused:
        return None
    by = [e for e in door.book.entries if e.alias == door.alias and e.to_version == target and e.action != "rollback"]
    return target, by[-1] if by and target is not None else None


def verdict_of(site: Site, version: Version, entry: LedgerEntry | None) -> Verdict | None:
    """The verdict that an entry names; None where it names none, or it is gone."""
    if entry is None or entry.verdict is None:
        return None
    return next((verdict for verdict in site.store.verdicts(version) if verdict.digest() == entry.verdict), None)
