"""What the gate says of a version and an alias, for the pages that change something. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.registry.core.errors import Refused
from limbeck.registry.gate import approvals, protection
from limbeck.registry.gate.evidence import gather_evidence
from limbeck.registry.gate.promotion import Candidate, rollback_target
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.ledger import log
from limbeck.registry.ledger.log import Ledger
from limbeck.registry.mlflow.identity import current_user
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import LedgerEntry, Verdict, Version
from limbeck.web.site import Site

PRODUCTION = "production"
MAX_CANDIDATES = 30  # candidates that are judged for one page


@dataclass(frozen=True)
class AliasGate:
    """An alias of a model: where it is, what judges for it, who stands before it."""

    name: str
    alias: str
    user: str  # as whom anything is done here
    ledger: Ledger
    policy: Policy | None  # None: nothing judges, so nothing passes
    is_protected: bool  # by the policy
    problem: str | None  # why nothing can move

    @property
    def current_version(self) -> int | None:
        """The version that the alias points at."""
        return self.ledger.aliases.get(self.alias)

    @property
    def fallback_policy(self) -> Policy | None:
        """The policy to hand to `limbeck.registry.gate.promotion.promote`: None where the alias has one of its own."""
        return None if self.is_protected else self.policy

    @property
    def last_entry_hash(self) -> str:
        """Hash of the last entry about the alias; "" where there is none."""
        last = self.ledger.last_move(self.alias)
        return last.hash if last else ""


def read_alias_gate(site: Site, name: str, alias: str) -> AliasGate:
    """Raises BadInput: no such model, an alias that cannot be used."""
    log.check_alias(alias)
    book = log.read_ledger(site.store, name)
    problems = book.problems(alias)
    policy, protected = site.policy, False
    try:
        own = protection.protecting_policy_in(book, alias)
        policy, protected = own or site.policy, own is not None
    except Refused as refused:
        policy = None
        problems = [refused.message, *problems]
    return AliasGate(
        name, alias, current_user(site.store.tracking_uri), book, policy, protected, "\n".join(problems) or None
    )


def judge_candidate(site: Site, alias_gate: AliasGate, version: Version) -> Candidate | None:
    """A version with its verdict as of now; None where nothing judges."""
    if alias_gate.policy is None:
        return None
    evidence = gather_evidence(site.store, version, alias_gate.policy, alias_gate.alias)
    return Candidate(version, apply_policy(alias_gate.policy, evidence), evidence.scorecard)


def cheapest_candidates(site: Site, alias_gate: AliasGate) -> tuple[list[Candidate], int]:
    """The cheapest MOST of the scored ONNX variants, judged, cheapest first; and how many were not judged."""
    variants = [found for found in site.store.versions_with_findings(alias_gate.name) if found.version.kind == "onnx"]
    price = {
        found.version: min(card.cost.usd_per_million_tokens if card.cost else float("inf") for card in found.scorecards)
        for found in variants
        if found.scorecards
    }
    cheapest = sorted(price, key=lambda version: (price[version], version.version))[:MAX_CANDIDATES]
    known = [candidate for version in cheapest if (candidate := judge_candidate(site, alias_gate, version))]
    return known, len(variants) - len(known)


def approval_state(site: Site, alias_gate: AliasGate, version: Version) -> approvals.ApprovalState:
    """What was asked and answered about the version and the alias."""
    return approvals.load_approval_state(site.store, version, alias_gate.alias)


def answer_obstacle(alias_gate: AliasGate, approval: approvals.ApprovalState) -> str | None:
    """Why an answer of whoever runs this would not count; None where it would, or nothing is asked."""
    return (
        approvals.ineligibility_reason(approval.version, approval.request, alias_gate.policy, alias_gate.user)
        if approval.request
        else None
    )


def override_obstacle(site: Site, alias_gate: AliasGate) -> str | None:
    """Why whoever runs this may not override a verdict; None where they may."""
    if alias_gate.policy is None:
        return "no policy says who may"
    return protection.override_refusal(alias_gate.policy, alias_gate.user, site.store, alias_gate.name)


def rollback_target_with_entry(alias_gate: AliasGate) -> tuple[int | None, LedgerEntry | None] | None:
    """The version that a rollback leads to, with the entry that had put the alias there; None: there is none."""
    try:
        target = rollback_target(alias_gate.ledger, alias_gate.alias)
    except Refused:
        return None
    by = [
        e
        for e in alias_gate.ledger.entries
        if e.alias == alias_gate.alias and e.to_version == target and e.action != "rollback"
    ]
    return target, by[-1] if by and target is not None else None


def verdict_of_entry(site: Site, version: Version, entry: LedgerEntry | None) -> Verdict | None:
    """The verdict that an entry names; None where it names none, or it is gone."""
    if entry is None or entry.verdict is None:
        return None
    return next(
        (verdict for verdict in site.store.findings.verdicts(version) if verdict.digest() == entry.verdict), None
    )
