"""What the gate says about a version and an alias, for the pages that change something. Writes nothing."""

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
MAX_CANDIDATES = 30  # judged for one page


@dataclass(frozen=True)
class AliasGate:
    """An alias of a model: its ledger, its policy and the current user."""

    name: str
    alias: str
    user: str  # who runs this server: the author of every change
    ledger: Ledger
    policy: Policy | None  # None: no policy, so nothing can be promoted
    is_protected: bool  # whether the policy protects the alias; False: it is the server's policy
    problem: str | None  # why the alias cannot move

    @property
    def current_version(self) -> int | None:
        """The version that the alias points at; None if it is not set."""
        return self.ledger.aliases.get(self.alias)

    @property
    def fallback_policy(self) -> Policy | None:
        """The policy for `limbeck.registry.gate.promotion.promote`: None if a policy protects the alias."""
        return None if self.is_protected else self.policy

    @property
    def last_entry_hash(self) -> str:
        """Hash of the last ledger entry about the alias; "" if there is none."""
        last = self.ledger.last_move(self.alias)
        return last.hash if last else ""


def read_alias_gate(site: Site, name: str, alias: str) -> AliasGate:
    """Read the state of an alias. Raises BadInput for an unknown model or an invalid alias."""
    log.check_alias(alias)
    ledger = log.read_ledger(site.store, name)
    problems = ledger.problems(alias)
    protecting_policy = None
    policy = site.policy
    try:
        protecting_policy = protection.protecting_policy_in(ledger, alias)
        policy = protecting_policy or site.policy
    except Refused as refused:
        policy = None
        problems = [refused.message, *problems]
    return AliasGate(
        name=name,
        alias=alias,
        user=current_user(site.store.tracking_uri),
        ledger=ledger,
        policy=policy,
        is_protected=protecting_policy is not None,
        problem="\n".join(problems) or None,
    )


def judge_candidate(site: Site, alias_gate: AliasGate, version: Version) -> Candidate | None:
    """A version with its current verdict; None if there is no policy."""
    if alias_gate.policy is None:
        return None
    evidence = gather_evidence(site.store, version, alias_gate.policy, alias_gate.alias)
    return Candidate(version, apply_policy(alias_gate.policy, evidence), evidence.scorecard)


def cheapest_candidates(site: Site, alias_gate: AliasGate) -> tuple[list[Candidate], int]:
    """The MAX_CANDIDATES cheapest scored ONNX variants with their verdicts, and how many variants were not judged.

    Empty without a policy to judge by.
    """
    if alias_gate.policy is None:
        return [], 0
    versions = site.store.versions_with_findings(alias_gate.name)
    variants = [findings for findings in versions if findings.version.kind == "onnx"]
    price = {
        findings.version: min(
            card.cost.usd_per_million_tokens if card.cost else float("inf") for card in findings.scorecards
        )
        for findings in variants
        if findings.scorecards
    }
    cheapest = sorted(price, key=lambda version: (price[version], version.version))[:MAX_CANDIDATES]
    judged = [judge_candidate(site, alias_gate, version) for version in cheapest]
    candidates = [candidate for candidate in judged if candidate is not None]
    return candidates, len(variants) - len(candidates)


def approval_state(site: Site, alias_gate: AliasGate, version: Version) -> approvals.ApprovalState:
    """The request for the version and the alias, with its answers."""
    return approvals.load_approval_state(site.store, version, alias_gate.alias)


def answer_obstacle(alias_gate: AliasGate, approval: approvals.ApprovalState) -> str | None:
    """Why an answer of the current user would not count; None if it would, or if there is no request."""
    return (
        approvals.ineligibility_reason(approval.version, approval.request, alias_gate.policy, alias_gate.user)
        if approval.request
        else None
    )


def override_obstacle(site: Site, alias_gate: AliasGate) -> str | None:
    """Why the current user may not override a verdict; None if they may."""
    if alias_gate.policy is None:
        return "no policy says who may override"
    return protection.override_refusal(alias_gate.policy, alias_gate.user, site.store, alias_gate.name)


def rollback_target_with_entry(alias_gate: AliasGate) -> tuple[int | None, LedgerEntry | None] | None:
    """The version that a rollback leads to, with the entry that promoted it.

    Returns:
        None if nothing was promoted; (None, None) if a rollback removes the alias.
    """
    try:
        target = rollback_target(alias_gate.ledger, alias_gate.alias)
    except Refused:
        return None
    promotions = [
        entry
        for entry in alias_gate.ledger.entries
        if entry.alias == alias_gate.alias and entry.to_version == target and entry.action != "rollback"
    ]
    if target is None or not promotions:
        return target, None
    return target, promotions[-1]


def verdict_of_entry(site: Site, version: Version, entry: LedgerEntry | None) -> Verdict | None:
    """The verdict that an entry refers to; None if it refers to none, or the verdict no longer exists."""
    if entry is None or entry.verdict is None:
        return None
    return next(
        (verdict for verdict in site.store.findings.verdicts(version) if verdict.digest() == entry.verdict), None
    )
