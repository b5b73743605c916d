"""Through the gate: an alias moves to a version whose verdict passes, and back again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.core.terminal import indent_lines
from limbeck.registry.gate import protection
from limbeck.registry.gate.evidence import Evidence, gather_evidence_for_versions
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.ledger import log
from limbeck.registry.ledger.chain import Ledger
from limbeck.registry.ledger.lock import with_alias_lock
from limbeck.registry.mlflow import identity
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import Policy
from limbeck.registry.provenance import attestation
from limbeck.registry.records import LedgerEntry, RuleResult, Scorecard, Verdict, Version

LONGEST_BROKEN = 1500  # characters of an entry
NEAREST = 5  # how many of the refused candidates an error tells of


@dataclass(frozen=True)
class Candidate:
    """A version that was judged, with what it was judged by."""

    version: Version
    verdict: Verdict
    scorecard: Scorecard | None
    approvals: tuple[str, ...] = ()  # digests

    @property
    def usd_per_million_tokens(self) -> float:
        """Dollars per million tokens; infinite where it was not measured."""
        return self.scorecard.cost.usd_per_million_tokens if self.scorecard and self.scorecard.cost else float("inf")

    @property
    def failing_rules(self) -> list[RuleResult]:
        """The rules that do not pass."""
        return [rule for rule in self.verdict.rules if rule.outcome != "pass"]


@dataclass(frozen=True)
class Promotion:
    """What came of a promotion."""

    name: str
    alias: str
    candidates: list[Candidate]  # cheapest first
    chosen: Version
    previous_version: int | None  # the version that the alias pointed at
    entry: LedgerEntry | None  # None: a dry run, or the alias was there already


class Vetoed(Refused):
    """No candidate passes the policy; `candidates` are the nearest first."""

    def __init__(self, candidates: list[Candidate], alias: str, *, fix: str | None = None) -> None:
        nearest = sorted(candidates, key=lambda c: (len(c.failing_rules), c.usd_per_million_tokens, c.version.version))
        lines = [f"nothing is promoted to {alias}:"]
        for candidate in nearest[:NEAREST]:
            lines.append(f"  {candidate.version.ref}: {candidate.verdict.outcome}")
            lines += [f"    {rule.rule} ({rule.outcome}): {rule.message}" for rule in candidate.failing_rules]
        if len(nearest) > NEAREST:
            lines.append(f"  and {len(nearest) - NEAREST} more that are further from passing")
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
    dry_run: bool = False,
    adopt: bool = False,
    override: bool = False,
    expected_verdict: str | None = None,
) -> Promotion:
    """Point an alias at a version that passes a policy.

    The verdicts are kept, the files are verified, the move is written to the ledger and then made; one process
    at a time for each model. An alias that is there already is left alone, without an entry.

    Args:
        store: where the versions are.
        model: `NAME/VERSION` or `NAME@ALIAS` for that one; a bare NAME for the cheapest of its ONNX variants
            that pass.
        alias: such as `production`.
        policy: the rules; None for those that the alias is protected by.
        who: kept in the ledger; `limbeck.registry.mlflow.identity.current_user` where None.
        reason: kept in the ledger.
        dry_run: judge, and write nothing.
        adopt: where the alias was moved through MLflow itself, or the ledger was tampered with: go on,
            and write the alias as it is found into the ledger first.
        override: move to a named version that does not pass, too, if the policy lets `who` do that.
        expected_verdict: `Verdict.judgement` of the verdict that a person was shown.

    Raises:
        Vetoed: no candidate passes; with each failing rule and its numbers.
        Refused: the alias is not where the ledger says, the verdict is not the `expected_verdict` one, no permission.
        BadInput: no such version, no ONNX variant, an alias that cannot be used, no policy.
        DamagedArtifact: the files of the chosen version are not those that were scored.
    """
    log.check_alias(alias)
    if override and not (_names_one_version(model) and reason.strip()):
        raise BadInput("an override is for one named version, and says why", fix="NAME/VERSION --override --reason ...")
    versions = _candidates(store, model)
    name = versions[0].name
    who = who or identity.current_user(store.tracking_uri)

    def once() -> Promotion:
        book = _consistent_ledger(store, name, alias, who, adopt=adopt, dry_run=dry_run)
        governing = protection.governing_policy(store, name, alias, policy, ledger_snapshot=book)
        known = gather_evidence_for_versions(store, versions, governing, alias)
        candidates = [_judge_candidate(store, governing, evidence, save_verdict=not dry_run) for evidence in known]
        candidates.sort(key=lambda candidate: (candidate.usd_per_million_tokens, candidate.version.version))
        if expected_verdict is not None:
            _check_expected_verdict(candidates, expected_verdict)
        chosen = next((candidate for candidate in candidates if candidate.verdict.outcome == "pass"), None)
        if chosen is None:
            if not override:
                raise Vetoed(candidates, alias)
            chosen = _check_override(store, name, alias, who, governing, candidates[0])
        store.artifacts.verified_folder(chosen.version)  # the very files, again
        before, entry = book.aliases.get(alias), None
        if not dry_run and before != chosen.version.version:
            entry = log.append_entry(
                store,
                name,
                based_on=book,
                who=who,
                alias=alias,
                action="promote",
                from_version=before,
                to_version=chosen.version.version,
                artifact=chosen.version.digest,
                verdict=chosen.verdict.digest(),
                reason=reason,
                override=chosen.verdict.outcome != "pass",
                overridden_rules=_failing_rule_texts(chosen),
                policy=governing.digest(),
                approvals=chosen.approvals,
                sbom=attestation.attest(store, chosen.version),
            )
            if refused := log.apply_or_revert(store, entry, who=who):
                raise refused
        return Promotion(name, alias, candidates, chosen.version, before, entry)

    return with_alias_lock(name, once)


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
    """Point an alias at the version before, as the ledger knows it; its files are verified first.

    Rolling back the first promotion takes the alias away (`to_version` is None in the entry).

    Args:
        expected_last_entry: hash of the last entry about the alias that a person was shown.

    Raises:
        Refused: nothing to go back to, the alias is not where the ledger says, or there is an entry after
            `expected_last_entry`.
        BadInput: no such model, or the version before was deleted.
        DamagedArtifact: the version before is damaged; the alias stays.
    """
    log.check_alias(alias)
    who = who or identity.current_user(store.tracking_uri)
    log.read_ledger(store, name)  # no lock for a name that is not there

    def once() -> LedgerEntry:
        book = _consistent_ledger(store, name, alias, who, adopt=adopt)
        last = book.last_move(alias)
        if expected_last_entry is not None and last is not None and last.hash != expected_last_entry:
            raise Refused(f"{name}@{alias} was moved by {last.who} meanwhile", fix="look again, then roll back")
        target = rollback_target(book, alias)
        before = store.get(f"{name}/{target}") if target is not None else None
        if before is not None:
            store.artifacts.verified_folder(before)
        entry = log.append_entry(
            store,
            name,
            based_on=book,
            who=who,
            alias=alias,
            action="rollback",
            from_version=book.aliases.get(alias),
            to_version=target,
            artifact=before.digest if before else None,
            verdict=None,
            reason=reason,
            **_promotion_fields(book, alias, target),
        )
        if refused := log.apply_or_revert(store, entry, who=who):
            raise refused
        return entry

    return with_alias_lock(name, once)


def rollback_target(ledger_snapshot: Ledger, alias: str) -> int | None:
    """The version before; None where the alias was nowhere. Raises Refused where it is not known."""
    history = ledger_snapshot.version_history(alias)
    if not history:
        raise Refused(f"{ledger_snapshot.name} has no promotion to {alias} to roll back")
    # Over a gap that was adopted, the first version that is left need not be the first that was.
    if history[-1] != ledger_snapshot.aliases.get(alias) or (len(history) == 1 and ledger_snapshot.adopted_problems):
        raise Refused(
            f"the ledger of {ledger_snapshot.name} does not tell where {alias} was before",
            fix=f"name the version: limbeck promote {ledger_snapshot.name}/VERSION --alias {alias} --adopt",
        )
    return history[-2] if len(history) > 1 else None


def _promotion_fields(ledger_snapshot: Ledger, alias: str, target: int | None) -> dict[str, Any]:
    """What the promotion that a rollback goes back to said of its version: an override stays one."""
    origin = next(
        (e for e in reversed(ledger_snapshot.moves(alias)) if e.to_version == target and e.action == "promote"), None
    )
    return (
        {field: getattr(origin, field) for field in ("override", "overridden_rules", "sbom")}
        if origin and target
        else {}
    )


def _consistent_ledger(store: Store, name: str, alias: str, who: str, *, adopt: bool, dry_run: bool = False) -> Ledger:
    """The ledger, where what a killed process began is finished; refuses to go on over what somebody else did."""
    book = log.read_ledger(store, name) if dry_run else log.finish_pending_moves(store, name, who=who)
    problems = book.problems(alias)
    if not problems:
        return book
    if not adopt:
        raise Refused(
            "\n".join([f"the ledger of {name} and its aliases do not agree:", *indent_lines(problems)]),
            fix=f"look at: limbeck models history {name}; to go on from what is there, add --adopt",
        )
    if dry_run:
        return book
    log.adopt_alias(store, name, alias, who=who, reason="; ".join(problems)[: log.LONGEST_REASON])
    return log.read_ledger(store, name)


def _check_override(store: Store, name: str, alias: str, who: str, policy: Policy, candidate: Candidate) -> Candidate:
    """A candidate that does not pass, for somebody who may promote it all the same. Raises Refused."""
    if why := protection.override_refusal(policy, who, store, name):
        raise Vetoed([candidate], alias, fix=f"it is not overridden: {why}")
    return candidate


def _failing_rule_texts(candidate: Candidate) -> tuple[str, ...]:
    """The rules that an override goes over, cut so that all of them fit into an entry."""
    said = [f"{rule.rule} ({rule.outcome}): {rule.message}" for rule in candidate.failing_rules]
    room = LONGEST_BROKEN // max(len(said), 1)
    return tuple(words if len(words) <= room else words[: room - 3] + "..." for words in said)


def _check_expected_verdict(candidates: list[Candidate], expected_verdict: str) -> None:
    """Raises Refused unless a verdict says what a person was shown."""
    if all(candidate.verdict.content_digest != expected_verdict for candidate in candidates):
        lines = [f"the verdict on {c.version.ref} is now another than the one shown" for c in candidates]
        raise Refused("\n".join(lines), fix="look at the verdict again")


def _names_one_version(model: str) -> bool:
    return "/" in model or "@" in model


def _candidates(store: Store, model: str) -> list[Version]:
    if _names_one_version(model):
        return [store.get(model)]
    versions = store.versions(model)
    if not versions:
        raise store.not_found_error(model)
    variants = [version for version in versions if version.kind == "onnx"]
    if not variants:
        raise BadInput(
            f"{model} has no ONNX variant to promote",
            fix=f"make them: limbeck export {versions[-1].ref}; or name a version: limbeck promote {versions[-1].ref}",
        )
    return variants


def _judge_candidate(store: Store, policy: Policy, evidence: Evidence, save_verdict: bool) -> Candidate:
    version, verdict = evidence.version, apply_policy(policy, evidence)
    approvals = tuple(answer.digest() for answer in evidence.approvals if answer.answer == "approve")
    return Candidate(
        version,
        store.findings.add_verdict(version, verdict) if save_verdict else verdict,
        evidence.scorecard,
        approvals,
    )
