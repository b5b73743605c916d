"""Through the gate: an alias moves to a version whose verdict passes, and back again."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass

from registry import ledger
from registry.errors import BadInput, Refused
from registry.policy import Policy, best_card, judge
from registry.records import LedgerEntry, Scorecard, Verdict, Version
from registry.store import Store


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


@dataclass(frozen=True)
class Promotion:
    """What came of a promotion."""

    name: str
    alias: str
    candidates: list[Candidate]
    chosen: Version
    entry: LedgerEntry | None  # None: a dry run, or the alias was there already
    moved: bool


def promote(
    store: Store,
    model: str,
    alias: str,
    policy: Policy,
    *,
    reason: str = "",
    who: str | None = None,
    dry_run: bool = False,
    adopt: bool = False,
) -> Promotion:
    """Point an alias at a version that passes a policy.

    Args:
        store: where the versions are.
        model: `NAME/VERSION` or `NAME@ALIAS` for that one; a bare NAME for the cheapest of its ONNX variants
            that pass.
        alias: such as `production`.
        policy: the rules.
        reason: kept in the ledger.
        who: kept in the ledger; `$LIMBECK_USER` or the user's name where None.
        dry_run: judge, and write nothing.
        adopt: where the alias was moved through MLflow itself, or the ledger was tampered with: go on,
            and write the alias as it is found into the ledger first.

    Raises:
        Refused: no candidate passes (with each failing rule and its numbers), or the alias is not where the
            ledger says.
        BadInput: no such version, no ONNX variant, an alias that cannot be used.
        DamagedArtifact: the files of the chosen version are not those that were scored.
    """
    ledger.check_alias(alias)
    versions = _candidates(store, model)
    name = versions[0].name
    with store.lock(f"promote-{name}"):
        if not dry_run:
            _settled(store, name, alias, _who(who), adopt)
        candidates = [_judged(store, version, policy, keep=not dry_run) for version in versions]
        passing = [candidate for candidate in candidates if candidate.verdict.outcome == "pass"]
        if not passing:
            raise _refusal(candidates, alias)
        best = min(passing, key=lambda candidate: (candidate.price, candidate.version.version))
        store.folder(best.version)  # the very files, again
        before = store.aliases(name).get(alias)
        entry = None
        moved = before != best.version.version
        if moved and not dry_run:
            entry = ledger.append(
                store,
                name,
                who=_who(who),
                alias=alias,
                action="promote",
                from_version=before,
                to_version=best.version.version,
                artifact=best.version.digest,
                verdict=best.verdict.digest(),
                reason=reason,
            )
            ledger.apply(store, entry)
        return Promotion(name, alias, candidates, best.version, entry, moved and not dry_run)


def rollback(
    store: Store, name: str, alias: str, *, reason: str = "", who: str | None = None, adopt: bool = False
) -> LedgerEntry:
    """Point an alias at the version before, as the ledger knows it; its files are verified first.

    Rolling back the first promotion takes the alias away (`to_version` is None in the entry).
    Raises Refused where there is nothing to go back to, or the alias is not where the ledger says;
    DamagedArtifact where the version before is damaged.
    """
    ledger.check_alias(alias)
    with store.lock(f"promote-{name}"):
        _settled(store, name, alias, _who(who), adopt)
        history = ledger.read(store, name).history(alias)
        if not history:
            raise Refused(f"{name} has no promotion to {alias} to roll back")
        target = history[-2] if len(history) > 1 else None
        before = store.get(f"{name}/{target}") if target is not None else None
        if before is not None:
            store.folder(before)
        entry = ledger.append(
            store,
            name,
            who=_who(who),
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


def _settled(store: Store, name: str, alias: str, who: str, adopt: bool) -> None:
    """Finish what a killed process began; refuse to go on over what somebody else did."""
    ledger.settle(store, name)
    book = ledger.read(store, name)
    problems = book.problems()
    if (moved := book.moved(alias)) and moved not in problems:
        problems.append(moved)
    if not problems:
        return
    if not adopt:
        raise Refused(
            "\n".join([f"the ledger of {name} and its aliases do not agree:", *(f"  {p}" for p in problems)]),
            fix=f"look at: limbeck models history {name}; to go on from what is there, add --adopt",
        )
    ledger.adopt(store, name, alias, who=who, reason="; ".join(problems)[: ledger.LONGEST_REASON])


def _candidates(store: Store, model: str) -> list[Version]:
    if "/" in model or "@" in model:
        return [store.get(model)]
    versions = store.versions(model)
    if not versions:
        raise store.unknown(model)
    variants = [version for version in versions if version.kind == "onnx"]
    if not variants:
        raise BadInput(
            f"{model} has no ONNX variant to promote",
            fix=f"make them: limbeck export {model}; or name one version: limbeck promote {versions[-1].ref}",
        )
    return variants


def _judged(store: Store, version: Version, policy: Policy, keep: bool) -> Candidate:
    card = best_card(policy, version, store.scorecards(version))
    verdict = judge(
        policy,
        version,
        card,
        store.parity(version),
        teacher_digest=_digest(store, version.teacher),
        parent_digest=_digest(store, version.parent) if version.kind == "onnx" else None,
    )
    return Candidate(version, store.add_verdict(version, verdict) if keep else verdict, card)


def _digest(store: Store, ref: str | None) -> str | None:
    return store.get(ref).digest if ref else None


def _refusal(candidates: list[Candidate], alias: str) -> Refused:
    lines = [f"nothing is promoted to {alias}:"]
    for candidate in candidates:
        lines.append(f"  {candidate.version.ref}: {candidate.verdict.outcome}")
        failing = [rule for rule in candidate.verdict.rules if rule.outcome != "pass"]
        lines += [f"    {rule.rule} ({rule.outcome}): {rule.message}" for rule in failing]
    return Refused("\n".join(lines))


def _who(who: str | None) -> str:
    return who or os.environ.get("LIMBECK_USER") or getpass.getuser()
