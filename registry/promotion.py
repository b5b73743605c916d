"""Through the gate: an alias moves to a version whose verdict passes, and back again."""

from __future__ import annotations

from dataclasses import dataclass

from registry import ledger, people, provenance
from registry.errors import BadInput, Refused
from registry.evidence import gather
from registry.policy import Policy
from registry.records import LedgerEntry, RuleResult, Scorecard, Verdict, Version
from registry.rules import judge
from registry.store import Store

NEAREST = 5  # how many of the refused candidates an error tells of


@dataclass(frozen=True)
class Candidate:
    """A version that was judged, with what it was judged by."""

    version: Version
    verdict: Verdict
    card: Scorecard | None

    @property
    def price(self) -> float:
        """Dollars per million tokens; infinite where it was not measured."""
        return self.card.cost.usd_per_million_tokens if self.card and self.card.cost else float("inf")

    @property
    def failing(self) -> list[RuleResult]:
        """The rules that do not pass."""
        return [rule for rule in self.verdict.rules if rule.outcome != "pass"]


@dataclass(frozen=True)
class Promotion:
    """What came of a promotion."""

    name: str
    alias: str
    candidates: list[Candidate]  # cheapest first
    chosen: Version
    before: int | None  # the version that the alias pointed at
    entry: LedgerEntry | None  # None: a dry run, or the alias was there already


class Vetoed(Refused):
    """No candidate passes the policy; `candidates` are the nearest first."""

    def __init__(self, candidates: list[Candidate], alias: str) -> None:
        nearest = sorted(candidates, key=lambda c: (len(c.failing), c.price, c.version.version))
        lines = [f"nothing is promoted to {alias}:"]
        for candidate in nearest[:NEAREST]:
            lines.append(f"  {candidate.version.ref}: {candidate.verdict.outcome}")
            lines += [f"    {rule.rule} ({rule.outcome}): {rule.message}" for rule in candidate.failing]
        if len(nearest) > NEAREST:
            lines.append(f"  and {len(nearest) - NEAREST} more that are further from passing")
        super().__init__("\n".join(lines))
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
    expected: str | None = None,
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
        who: kept in the ledger; `registry.people.user` where None.
        reason: kept in the ledger.
        dry_run: judge, and write nothing.
        adopt: where the alias was moved through MLflow itself, or the ledger was tampered with: go on,
            and write the alias as it is found into the ledger first.
        override: move to a named version that does not pass, too, if the policy lets `who` do that.
        expected: `Verdict.judgement` of the verdict that a person was shown.

    Raises:
        Vetoed: no candidate passes; with each failing rule and its numbers.
        Refused: the alias is not where the ledger says, the verdict is not the `expected` one, no permission.
        BadInput: no such version, no ONNX variant, an alias that cannot be used, no policy.
        DamagedArtifact: the files of the chosen version are not those that were scored.
    """
    ledger.check_alias(alias)
    if override and not (_named(model) and reason.strip()):
        raise BadInput("an override is for one named version, and says why", fix="NAME/VERSION --override --reason ...")
    versions = _candidates(store, model)
    name = versions[0].name
    who = who or people.user(store.tracking_uri)
    with store.lock(f"promote-{name}"):
        _check_ledger(store, name, alias, who, adopt=adopt, dry_run=dry_run)
        governing = _governing(policy)
        candidates = [_judged(store, version, governing, alias, keep=not dry_run) for version in versions]
        candidates.sort(key=lambda candidate: (candidate.price, candidate.version.version))
        if expected is not None:
            _still_said(candidates, expected)
        best = next((candidate for candidate in candidates if candidate.verdict.outcome == "pass"), None)
        overridden = best is None and override
        if best is None:
            if not overridden:
                raise Vetoed(candidates, alias)
            best = candidates[0]
        store.folder(best.version)  # the very files, again
        before = store.aliases(name).get(alias)
        entry = None
        if not dry_run and before != best.version.version:
            entry = ledger.append(
                store,
                name,
                who=who,
                alias=alias,
                action="promote",
                from_version=before,
                to_version=best.version.version,
                artifact=best.version.digest,
                verdict=best.verdict.digest(),
                reason=reason,
                override=overridden,
                broken=tuple(f"{rule.rule} ({rule.outcome}): {rule.message}" for rule in best.failing),
                policy=governing.digest(),
                sbom=provenance.attest(store, best.version),
            )
            ledger.apply(store, entry)
        return Promotion(name, alias, candidates, best.version, before, entry)


def rollback(
    store: Store,
    name: str,
    alias: str,
    *,
    who: str | None = None,
    reason: str = "",
    adopt: bool = False,
    seen: str | None = None,
) -> LedgerEntry:
    """Point an alias at the version before, as the ledger knows it; its files are verified first.

    Rolling back the first promotion takes the alias away (`to_version` is None in the entry).

    Args:
        seen: hash of the last entry about the alias that a person was shown.

    Raises:
        Refused: nothing to go back to, the alias is not where the ledger says, or there is an entry after `seen`.
        BadInput: no such model, or the version before was deleted.
        DamagedArtifact: the version before is damaged; the alias stays.
    """
    ledger.check_alias(alias)
    who = who or people.user(store.tracking_uri)
    ledger.read(store, name)  # no lock for a name that is not there
    with store.lock(f"promote-{name}"):
        _check_ledger(store, name, alias, who, adopt=adopt)
        book = ledger.read(store, name)
        last = book.last(alias)
        if seen is not None and last is not None and last.hash != seen:
            raise Refused(f"{name}@{alias} was moved by {last.who} meanwhile", fix="look again, then roll back")
        history = book.history(alias)
        if not history:
            raise Refused(f"{name} has no promotion to {alias} to roll back")
        if history[-1] != book.aliases.get(alias):
            raise Refused(
                f"the ledger of {name} does not tell where {alias} was before",
                fix=f"name the version: limbeck promote {name}/VERSION --to {alias} --adopt",
            )
        target = history[-2] if len(history) > 1 else None
        before = store.get(f"{name}/{target}") if target is not None else None
        if before is not None:
            store.folder(before)
        entry = ledger.append(
            store,
            name,
            who=who,
            alias=alias,
            action="rollback",
            from_version=history[-1],
            to_version=target,
            artifact=before.digest if before else None,
            verdict=None,
            reason=reason,
        )
        ledger.apply(store, entry)
        return entry


def _check_ledger(store: Store, name: str, alias: str, who: str, *, adopt: bool, dry_run: bool = False) -> None:
    """Finish what a killed process began; refuse to go on over what somebody else did."""
    if not dry_run:
        ledger.settle(store, name, who=who)
    problems = ledger.read(store, name).problems(alias)
    if problems and not adopt:
        raise Refused(
            "\n".join([f"the ledger of {name} and its aliases do not agree:", *(f"  {p}" for p in problems)]),
            fix=f"look at: limbeck models history {name}; to go on from what is there, add --adopt",
        )
    if problems and not dry_run:
        ledger.adopt(store, name, alias, who=who, reason="; ".join(problems)[: ledger.LONGEST_REASON])


def _governing(policy: Policy | None) -> Policy:
    """The policy that an alias is judged by."""
    if policy is None:
        raise BadInput("no policy to judge by", fix="give one: --policy FILE")
    return policy


def _still_said(candidates: list[Candidate], expected: str) -> None:
    """Raises Refused unless a verdict says what a person was shown."""
    if all(candidate.verdict.judgement != expected for candidate in candidates):
        lines = [f"the verdict on {c.version.ref} is now another than the one shown" for c in candidates]
        raise Refused("\n".join(lines), fix="look at the verdict again")


def _named(model: str) -> bool:
    return "/" in model or "@" in model


def _candidates(store: Store, model: str) -> list[Version]:
    if _named(model):
        return [store.get(model)]
    versions = store.versions(model)
    if not versions:
        raise store.unknown(model)
    variants = [version for version in versions if version.kind == "onnx"]
    if not variants:
        raise BadInput(
            f"{model} has no ONNX variant to promote",
            fix=f"make them: limbeck export {versions[-1].ref}; or name a version: limbeck promote {versions[-1].ref}",
        )
    return variants


def _judged(store: Store, version: Version, policy: Policy, alias: str, keep: bool) -> Candidate:
    evidence = gather(store, version, policy, alias)
    verdict = judge(policy, evidence)
    return Candidate(version, store.add_verdict(version, verdict) if keep else verdict, evidence.card)
