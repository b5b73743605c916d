"""Promotion and rollback: an alias moves to a version that passes the policy, and back again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.gate import protection
from limbeck.registry.gate.evidence import Evidence, gather_evidence_for_versions
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.gate.rules.deployment import serving_obstacle
from limbeck.registry.ledger import log
from limbeck.registry.ledger.chain import Ledger
from limbeck.registry.ledger.lock import with_alias_lock
from limbeck.registry.mlflow import identity
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import Policy
from limbeck.registry.provenance import attestation
from limbeck.registry.records import LedgerEntry, RuleResult, Scorecard, Verdict, Version

MAX_OVERRIDDEN_RULES_LENGTH = 1500  # characters of an entry
MAX_REPORTED_CANDIDATES = 5  # in an error


@dataclass(frozen=True)
class Candidate:
    """A version, the policy's verdict on it and the evidence for that."""

    version: Version
    verdict: Verdict
    scorecard: Scorecard | None
    approvals: tuple[str, ...] = ()  # digests

    @property
    def usd_per_million_tokens(self) -> float:
        """Dollars per million tokens; infinite if it was not measured."""
        return self.scorecard.cost.usd_per_million_tokens if self.scorecard and self.scorecard.cost else float("inf")

    @property
    def failing_rules(self) -> list[RuleResult]:
        """The rules that do not pass."""
        return [rule for rule in self.verdict.rules if rule.outcome != "pass"]

    def describe_failing_rules(self) -> list[str]:
        """A line for each rule that does not pass, with its numbers."""
        return [f"{rule.rule} ({rule.outcome}): {rule.message}" for rule in self.failing_rules]


@dataclass(frozen=True)
class PromotionOptions:
    """How a promotion is made.

    Attributes:
        dry_run: decide, and write nothing.
        adopt: if the alias was moved through MLflow itself, or the ledger was changed: write the alias into the
            ledger as it is, then go on.
        override: move to a named version even if it does not pass, if the policy allows that to the user.
        expected_verdict: `Verdict.content_digest` of the verdict that a person was shown.
    """

    dry_run: bool = False
    adopt: bool = False
    override: bool = False
    expected_verdict: str | None = None


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion."""

    name: str
    alias: str
    candidates: list[Candidate]  # cheapest first
    chosen: Version
    previous_version: int | None  # the version that the alias pointed at
    entry: LedgerEntry | None  # None: a dry run, or the alias points at the version already


class Vetoed(Refused):
    """No candidate passes the policy. `candidates` are sorted by their number of failing rules."""

    def __init__(self, candidates: list[Candidate], alias: str, *, fix: str | None = None) -> None:
        nearest = sorted(candidates, key=lambda c: (len(c.failing_rules), c.usd_per_million_tokens, c.version.version))
        lines = [f"nothing is promoted to {alias}:"]
        for candidate in nearest[:MAX_REPORTED_CANDIDATES]:
            lines.append(f"  {candidate.version.ref}: {candidate.verdict.outcome}")
            lines += [f"    {line}" for line in candidate.describe_failing_rules()]
        if len(nearest) > MAX_REPORTED_CANDIDATES:
            lines.append(f"  and {len(nearest) - MAX_REPORTED_CANDIDATES} more with more failing rules or higher costs")
        super().__init__("\n".join(lines), fix=fix)
        self.candidates = nearest


def promote(
    store: Store,
    model: str,
    alias: str,
    policy: Policy | None,
    *,
    who: str | None = None,
    reason: str = "",
    options: PromotionOptions = PromotionOptions(),
) -> Promotion:
    """Point an alias at a version that passes a policy.

    Stores the verdicts, verifies the files, writes the move to the ledger, then moves the alias; one process at a time
    for each model. An alias that points at the version already stays as it is, without an entry.

    Args:
        store: where the versions are.
        model: `NAME/VERSION` or `NAME@ALIAS` for that version; a bare NAME for the cheapest of its ONNX variants that
            passes.
        alias: such as `production`.
        policy: None for the policy that protects the alias.
        who: for the ledger; None for `limbeck.registry.mlflow.identity.current_user`.
        reason: for the ledger.
        options: see `PromotionOptions`.

    Raises:
        Vetoed: no candidate passes; the message has each failing rule with its numbers.
        Refused: the alias is not where the ledger says, the verdict is not the `expected_verdict`, or the user has no
            permission.
        BadInput: no such version, no ONNX variant, an alias that cannot be used, or no policy.
        DamagedArtifact: the files of the chosen version are not those that were scored.
    """
    log.check_alias(alias)
    if options.override and not (_names_one_version(model) and reason.strip()):
        raise BadInput(
            "an override needs one named version and a reason", fix="give NAME/VERSION --override --reason ..."
        )
    versions = _candidate_versions(store, model)
    name = versions[0].name
    who = who or identity.current_user(store.tracking_uri)

    def promote_locked() -> Promotion:
        ledger = _consistent_ledger(store, name, alias, who, adopt=options.adopt, dry_run=options.dry_run)
        governing = protection.governing_policy(store, name, alias, policy, ledger=ledger)
        evidence = gather_evidence_for_versions(store, versions, governing, alias)
        candidates = _judge_candidates(store, governing, evidence, save_verdicts=not options.dry_run)
        if options.expected_verdict is not None:
            _check_expected_verdict(candidates, options.expected_verdict)
        chosen = next((candidate for candidate in candidates if candidate.verdict.outcome == "pass"), None)
        if chosen is None:
            if not options.override:
                raise Vetoed(candidates, alias)
            chosen = candidates[0]
            _check_override_permission(store, chosen, alias, governing, who)
        store.artifacts.verified_folder(chosen.version)  # the files may have changed since they were scored
        previous, entry = ledger.aliases.get(alias), None
        if not options.dry_run and previous != chosen.version.version:
            entry = _append_promotion(store, ledger, alias, chosen, governing, who, reason)
            refused = log.apply_or_revert(store, entry, who=who)
            if refused:
                raise refused
        return Promotion(name, alias, candidates, chosen.version, previous, entry)

    return with_alias_lock(name, promote_locked)


def rollback(
    store: Store,
    name: str,
    alias: str,
    *,
    who: str | None = None,
    reason: str = "",
    adopt: bool = False,
    expected_last_entry: str | None = None,
) -> LedgerEntry:
    """Point an alias at its previous version in the ledger, after verifying that version's files.

    Rolling back the first promotion removes the alias (`to_version` is None in the entry).

    Args:
        adopt: see `PromotionOptions`.
        expected_last_entry: hash of the last entry about the alias that a person was shown.

    Raises:
        Refused: there is no previous version, the alias is not where the ledger says, or there is an entry after
            `expected_last_entry`.
        BadInput: no such model, or the previous version was deleted.
        DamagedArtifact: the previous version is damaged; the alias stays.
    """
    log.check_alias(alias)
    who = who or identity.current_user(store.tracking_uri)
    log.read_ledger(store, name)  # raises for an unknown name, before there is a lock file for it

    def rollback_locked() -> LedgerEntry:
        ledger = _consistent_ledger(store, name, alias, who, adopt=adopt)
        last = ledger.last_move(alias)
        if expected_last_entry is not None and last is not None and last.hash != expected_last_entry:
            raise Refused(f"{last.who} has moved {name}@{alias} meanwhile", fix="look again, then roll back")
        target = rollback_target(ledger, alias)
        version = store.get(f"{name}/{target}") if target is not None else None
        if version is not None:
            store.artifacts.verified_folder(version)
        entry = log.append_entry(
            store,
            name,
            based_on=ledger,
            who=who,
            alias=alias,
            action="rollback",
            from_version=ledger.aliases.get(alias),
            to_version=target,
            artifact=version.digest if version else None,
            verdict=None,
            reason=reason,
            **_promotion_fields(ledger, alias, target),
        )
        refused = log.apply_or_revert(store, entry, who=who)
        if refused:
            raise refused
        return entry

    return with_alias_lock(name, rollback_locked)


def rollback_target(ledger: Ledger, alias: str) -> int | None:
    """The previous version of an alias; None if the alias did not exist. Raises Refused if it is unknown."""
    history = ledger.version_history(alias)
    if not history:
        raise Refused(f"{ledger.name} has no promotion to {alias} to roll back")
    # After a gap that was adopted, the oldest version in the history need not be the first that the alias had.
    if history[-1] != ledger.aliases.get(alias) or (len(history) == 1 and ledger.adopted_problems):
        raise Refused(
            f"the ledger of {ledger.name} does not have the previous version of {alias}",
            fix=f"name the version: limbeck promote {ledger.name}/VERSION --alias {alias} --adopt",
        )
    return history[-2] if len(history) > 1 else None


def _append_promotion(
    store: Store, ledger: Ledger, alias: str, chosen: Candidate, policy: Policy, who: str, reason: str
) -> LedgerEntry:
    """Write a promotion to the ledger, and the SBOM to the version."""
    return log.append_entry(
        store,
        ledger.name,
        based_on=ledger,
        who=who,
        alias=alias,
        action="promote",
        from_version=ledger.aliases.get(alias),
        to_version=chosen.version.version,
        artifact=chosen.version.digest,
        verdict=chosen.verdict.digest(),
        reason=reason,
        override=chosen.verdict.outcome != "pass",
        overridden_rules=_overridden_rules(chosen),
        policy=policy.digest(),
        approvals=chosen.approvals,
        sbom=attestation.attest(store, chosen.version),
    )


def _promotion_fields(ledger: Ledger, alias: str, target: int | None) -> dict[str, Any]:
    """The fields of the promotion that a rollback goes back to; an override stays an override."""
    moves = [entry for entry in ledger.moves(alias) if entry.to_version == target and entry.action == "promote"]
    if not moves or not target:
        return {}
    return {field: getattr(moves[-1], field) for field in ("override", "overridden_rules", "sbom")}


def _consistent_ledger(store: Store, name: str, alias: str, who: str, *, adopt: bool, dry_run: bool = False) -> Ledger:
    """The ledger, after finishing what a killed process left unfinished.

    Raises Refused if the ledger and the alias do not agree, unless they are adopted.
    """
    ledger = log.read_ledger(store, name) if dry_run else log.finish_pending_moves(store, name, who=who)
    problems = ledger.problems(alias)
    if not problems:
        return ledger
    if not adopt:
        fix = f"look at: limbeck models history {name}; to accept the current state, add --adopt"
        raise ledger.disagreement(problems, fix)
    if dry_run:
        return ledger
    log.adopt_alias(store, name, alias, who=who, reason="; ".join(problems)[: log.LONGEST_REASON])
    return log.read_ledger(store, name)


def _check_override_permission(store: Store, candidate: Candidate, alias: str, policy: Policy, who: str) -> None:
    """Raises Vetoed if somebody may not promote a candidate that does not pass."""
    why = protection.override_refusal(policy, who, store, candidate.version.name)
    if why is not None:
        raise Vetoed([candidate], alias, fix=f"it is not overridden: {why}")


def _overridden_rules(candidate: Candidate) -> tuple[str, ...]:
    """The failing rules as text, cut so that all of them fit into an entry."""
    lines = candidate.describe_failing_rules()
    room = MAX_OVERRIDDEN_RULES_LENGTH // max(len(lines), 1)
    return tuple(line if len(line) <= room else line[: room - 3] + "..." for line in lines)


def _check_expected_verdict(candidates: list[Candidate], expected_verdict: str) -> None:
    """Raises Refused if no candidate has the verdict that a person was shown."""
    if all(candidate.verdict.content_digest != expected_verdict for candidate in candidates):
        lines = [f"the gate decision on {c.version.ref} differs from the one shown" for c in candidates]
        raise Refused("\n".join(lines), fix="look at the gate decision again")


def _names_one_version(model: str) -> bool:
    return "/" in model or "@" in model


def _candidate_versions(store: Store, model: str) -> list[Version]:
    if _names_one_version(model):
        return [store.get(model)]
    versions = store.versions(model)
    if not versions:
        raise store.not_found_error(model)
    variants = [version for version in versions if serving_obstacle(version) is None]
    if not variants:
        raise BadInput(
            f"{model} has no ONNX variant to promote",
            fix=f"make one: limbeck export {versions[-1].ref} --precision fp32,int8-weight",
        )
    return variants


def skipped_versions(store: Store, model: str) -> dict[str, str]:
    """NAME/VERSION -> why `promote` does not consider it for a bare NAME; empty for a single version."""
    if _names_one_version(model):
        return {}
    versions = store.versions(model)
    exported = {version.parent for version in versions if version.kind == "onnx"}
    skipped = {}
    for version in versions:
        obstacle = serving_obstacle(version)
        if obstacle and version.ref in exported:
            skipped[version.ref] = "PyTorch, with ONNX variants among the candidates"
        elif obstacle:
            skipped[version.ref] = obstacle
    return skipped


def _judge_candidates(
    store: Store, policy: Policy, evidence: Sequence[Evidence], *, save_verdicts: bool
) -> list[Candidate]:
    """The candidates with the policy's verdicts, cheapest first."""
    candidates = []
    for each in evidence:
        verdict = apply_policy(policy, each)
        if save_verdicts:
            verdict = store.findings.add_verdict(each.version, verdict)
        approvals = tuple(answer.digest() for answer in each.approvals if answer.answer == "approve")
        candidates.append(Candidate(each.version, verdict, each.scorecard, approvals))
    return sorted(candidates, key=lambda candidate: (candidate.usd_per_million_tokens, candidate.version.version))
