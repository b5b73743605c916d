"""The evidence for a gate decision: a version's scorecard, parity, lineage licences and approvals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from limbeck.registry.core.errors import BadInput
from limbeck.registry.gate import approvals
from limbeck.registry.ledger import log
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import CostLimits, LicenceRules, Policy
from limbeck.registry.provenance import licences
from limbeck.registry.provenance.licences import LineageLicence
from limbeck.registry.records import Approval, Parity, Request, Scorecard, Version

DELETED = "deleted"  # in place of the digest of a deleted teacher or parent; it equals no digest, so nothing is of it


@dataclass(frozen=True)
class Evidence:
    """What is known about a version when a policy is applied to it."""

    version: Version  # the candidate; the scorecard has to be of its exact files
    scorecard: Scorecard | None
    parity: Parity | None = None  # of an ONNX variant with its PyTorch model
    teacher_digest: str | None = None  # the scorecard has to be relative to the teacher with this digest
    parent_digest: str | None = None  # the parity has to be with the model with this digest
    alias: str = ""  # that would point at the version; empty if that is not asked
    request: Request | None = None  # the newest that this alias may point at the version
    approvals: tuple[Approval, ...] = ()  # the answers to `request`, oldest first
    ignored_records: tuple[str, ...] = ()  # why requests and answers are ignored
    lineage_licences: tuple[LineageLicence, ...] = ()  # empty if the policy has no rule on licences
    load_documents: Callable[[], Path] | None = None  # the parquet file of the scorecard's documents
    judged_at: datetime = field(default_factory=lambda: datetime.now(UTC))


def gather_evidence(store: Store, version: Version, policy: Policy, alias: str) -> Evidence:
    """The evidence about a version, with the scorecard that answers most of the policy."""
    return gather_evidence_for_versions(store, [version], policy, alias)[0]


def gather_evidence_for_versions(
    store: Store, versions: Sequence[Version], policy: Policy, alias: str
) -> list[Evidence]:
    """The same for versions of one name. Reads their tags in one query, and each parent and teacher once."""
    tags = store.tags(versions)
    refs = {ref for version in versions for ref in (version.teacher, version.parent) if ref}
    digests = {ref: _digest_or_deleted(store, ref) for ref in sorted(refs)}
    entries = log.read_entries(store, versions[0].name) if policy.approvals.needed and versions else []

    def evidence(version: Version) -> Evidence:
        version_tags = tags[version.ref]
        teacher_digest = digests[version.teacher] if version.teacher else None
        card = best_scorecard(policy, version, store.findings.scorecards(version, version_tags), teacher_digest)
        state = approvals.ApprovalState(version)
        if policy.approvals.needed:
            state = approvals.approval_state_from_tags(version, version_tags, entries, alias)
        return Evidence(
            version,
            card,
            store.findings.parity(version, version_tags),
            teacher_digest=teacher_digest,
            parent_digest=digests[version.parent] if version.parent and version.kind == "onnx" else None,
            alias=alias,
            request=state.request,
            approvals=state.answers,
            ignored_records=state.ignored_records,
            lineage_licences=tuple(licences.lineage_licences(store, version)) if _needs_licences(policy) else (),
            load_documents=partial(store.findings.documents, version, card) if card else None,
        )

    return [evidence(version) for version in versions]


def _digest_or_deleted(store: Store, ref: str) -> str:
    try:
        return store.get(ref).digest
    except BadInput:
        return DELETED


def _needs_licences(policy: Policy) -> bool:
    return policy.licence != LicenceRules() or policy.lineage.require_distillation_licence


def best_scorecard(
    policy: Policy, version: Version, scorecards: Sequence[Scorecard], teacher_digest: str | None = None
) -> Scorecard | None:
    """The newest scorecard that answers the whole policy, else the newest; None without scorecards.

    A scorecard that is relative to another model than the teacher with `teacher_digest` does not answer the policy.
    """
    rules = policy.quality

    def answers_policy(card: Scorecard) -> bool:
        tasks_and_metrics = {*card.tasks, *(result.metric for result in card.tasks.values())}
        return (
            card.artifact == version.digest
            and card.relative is not None
            and card.relative.teacher_digest == (teacher_digest or card.relative.teacher_digest)
            and set(rules.tasks) <= card.tasks.keys()
            and rules.min_task_retention.keys() <= card.relative.task_retention.keys()
            and rules.margin.keys() <= tasks_and_metrics
            and all(result.documents >= (rules.min_documents or 0) for result in card.tasks.values())
            and (card.cost is not None or policy.cost == CostLimits())
            and (card.contamination is not None or policy.lineage.max_contamination is None)
        )

    return next((card for card in reversed(scorecards) if answers_policy(card)), scorecards[-1] if scorecards else None)
