"""What the gate judges a version by: its scorecard, its parity, what it came from, who approved it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from registry.policy import CostLimits, Policy
from registry.records import Approval, Parity, Request, Scorecard, Version
from registry.store import Store


@dataclass(frozen=True)
class Evidence:
    """All that is known of a version when it is judged."""

    version: Version  # the candidate; the scorecard has to be of its very files
    card: Scorecard | None
    parity: Parity | None = None  # how an ONNX variant compares with its PyTorch model
    teacher_digest: str | None = None  # of its teacher; the scorecard has to be relative to that very teacher
    parent_digest: str | None = None  # of its parent; the parity has to be with that very model
    alias: str = "production"  # that is to point at it
    request: Request | None = None  # the newest that asks for this alias to point at it
    approvals: tuple[Approval, ...] = ()  # the answers to it, oldest first
    now: datetime = field(default_factory=lambda: datetime.now(UTC))


def gather(store: Store, version: Version, policy: Policy, alias: str) -> Evidence:
    """What the store knows of a version, with the scorecard that answers the most of what the policy asks."""
    teacher_digest = _digest(store, version.teacher)
    return Evidence(
        version,
        best_card(policy, version, store.scorecards(version), teacher_digest),
        store.parity(version),
        teacher_digest=teacher_digest,
        parent_digest=_digest(store, version.parent) if version.kind == "onnx" else None,
        alias=alias,
    )


def _digest(store: Store, ref: str | None) -> str | None:
    return store.get(ref).digest if ref else None


def best_card(
    policy: Policy, version: Version, cards: Sequence[Scorecard], teacher_digest: str | None = None
) -> Scorecard | None:
    """The scorecard to judge by: the newest that answers all the policy asks, else the newest; or None.

    One that is relative to another model than the teacher of `teacher_digest` answers nothing.
    """
    asked = policy.quality

    def answers(card: Scorecard) -> bool:
        return (
            card.artifact == version.digest
            and card.relative is not None
            and card.relative.teacher_digest == (teacher_digest or card.relative.teacher_digest)
            and set(asked.tasks) <= card.tasks.keys()
            and asked.min_task_retention.keys() <= card.relative.task_retention.keys()
            and all(result.documents >= (asked.min_documents or 0) for result in card.tasks.values())
            and (card.cost is not None or policy.cost == CostLimits())
            and (card.contamination is not None or policy.lineage.max_contamination is None)
        )

    return next((card for card in reversed(cards) if answers(card)), cards[-1] if cards else None)
