"""What the gate judges a version by: its scorecard, its parity, what it came from, who approved it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from limbeck.registry.gate import approvals
from limbeck.registry.ledger import log
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import CostLimits, LicenceRules, Policy
from limbeck.registry.provenance import licences
from limbeck.registry.provenance.licences import LineageLicence
from limbeck.registry.records import Approval, Parity, Request, Scorecard, Version


@dataclass(frozen=True)
class Evidence:
    """All that is known of a version when it is judged."""

    version: Version  # the candidate; the scorecard has to be of its very files
    scorecard: Scorecard | None
    parity: Parity | None = None  # how an ONNX variant compares with its PyTorch model
    teacher_digest: str | None = None  # of its teacher; the scorecard has to be relative to that very teacher
    parent_digest: str | None = None  # of its parent; the parity has to be with that very model
    alias: str = "production"  # that is to point at it
    request: Request | None = None  # the newest that asks for this alias to point at it
    approvals: tuple[Approval, ...] = ()  # the answers to it, oldest first
    ignored_records: tuple[str, ...] = ()  # requests and answers that count for nothing, and why
    lineage_licences: tuple[LineageLicence, ...] = ()  # the licences along its lineage, where the policy asks for them
    load_documents: Callable[[], Path] | None = None  # gives the parquet of the scorecard's documents
    judged_at: datetime = field(default_factory=lambda: datetime.now(UTC))


def gather_evidence(store: Store, version: Version, policy: Policy, alias: str) -> Evidence:
    """What the store knows of a version, with the scorecard that answers the most of what the policy asks."""
    return gather_evidence_for_versions(store, [version], policy, alias)[0]


def gather_evidence_for_versions(
    store: Store, versions: Sequence[Version], policy: Policy, alias: str
) -> list[Evidence]:
    """The same of versions of one name, each read once: their tags in one query, and what they came from."""
    tags = store.tags(versions)
    refs = {ref for version in versions for ref in (version.teacher, version.parent) if ref}
    digests = {ref: store.get(ref).digest for ref in sorted(refs)}
    entries = log.read_entries(store, versions[0].name) if policy.approvals.needed and versions else []

    def evidence(version: Version) -> Evidence:
        known = tags[version.ref]
        teacher_digest = digests[version.teacher] if version.teacher else None
        card = best_scorecard(policy, version, store.findings.scorecards(version, known), teacher_digest)
        asked = approvals.approval_state_from_tags(version, known, entries, alias) if policy.approvals.needed else None
        return Evidence(
            version,
            card,
            store.findings.parity(version, known),
            teacher_digest=teacher_digest,
            parent_digest=digests[version.parent] if version.parent and version.kind == "onnx" else None,
            alias=alias,
            request=asked.request if asked else None,
            approvals=asked.answers if asked else (),
            ignored_records=asked.ignored_records if asked else (),
            lineage_licences=tuple(licences.lineage_licences(store, version)) if _needs_licences(policy) else (),
            load_documents=partial(store.findings.documents, version, card) if card else None,
        )

    return [evidence(version) for version in versions]


def _needs_licences(policy: Policy) -> bool:
    return policy.licence != LicenceRules() or policy.lineage.require_distillation_licence


def best_scorecard(
    policy: Policy, version: Version, scorecards: Sequence[Scorecard], teacher_digest: str | None = None
) -> Scorecard | None:
    """The scorecard to judge by: the newest that answers all the policy asks, else the newest; or None.

    One that is relative to another model than the teacher of `teacher_digest` answers nothing.
    """
    asked = policy.quality

    def answers(card: Scorecard) -> bool:
        known = {*card.tasks, *(result.metric for result in card.tasks.values())}
        return (
            card.artifact == version.digest
            and card.relative is not None
            and card.relative.teacher_digest == (teacher_digest or card.relative.teacher_digest)
            and set(asked.tasks) <= card.tasks.keys()
            and asked.min_task_retention.keys() <= card.relative.task_retention.keys()
            and asked.margin.keys() <= known
            and all(result.documents >= (asked.min_documents or 0) for result in card.tasks.values())
            and (card.cost is not None or policy.cost == CostLimits())
            and (card.contamination is not None or policy.lineage.max_contamination is None)
        )

    return next((card for card in reversed(scorecards) if answers(card)), scorecards[-1] if scorecards else None)
