"""The records of a verdict: its answer, its candidates, and the tasks that are not settled."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from limbeck.evals.cost.payback import Payback
from limbeck.registry.records import ComparedTask, Cost, Engine, Estimate, Frozen, Kind, Outcome, TrainingCost

VerdictAnswer = Literal["yes", "no", "not settled"]


class OpenTask(Frozen):
    """A task on which a candidate is inconclusive, and what would settle it if the difference stays the same."""

    task: str
    documents: int | None  # about this many; None: the difference equals the margin, so no number would settle it
    as_good: bool  # whether they would show it as good, or as worse
    margin: float  # it passes at a larger margin than this, corrected for all candidates


class Candidate(Frozen):
    """A version compared with the teacher: is it as good, and is it cheaper?"""

    version: str  # NAME/VERSION
    artifact_digest: str
    kind: Kind
    engine: Engine
    precision: str
    recipe: str | None
    is_teacher: bool  # the teacher itself in another form: exported, quantized
    scorecard: str  # digest
    quality: Outcome  # pass: as good on every task; fail: surely worse by more than the margin on one
    cheaper: bool | None  # surely cheaper, or surely not; None: unknown
    retention: Estimate | None  # mean over the tasks that have one
    tasks: tuple[ComparedTask, ...]
    open_tasks: tuple[OpenTask, ...]  # the inconclusive tasks
    unknown_tasks: dict[str, str]  # task -> why it cannot be tested
    cost: Cost | None
    teacher_cost: Cost | None  # of the same run; None if it was not timed with this candidate
    cost_ratio: float | None
    cost_ratio_interval: Estimate | None
    speedup: float | None
    speedup_interval: Estimate | None
    training_cost: TrainingCost | None
    payback: Payback | None


class VerdictReport(Frozen):
    """`limbeck verdict NAME --format json`. Stable: fields are only added. Unknown values are null."""

    name: str
    answer: VerdictAnswer
    sentence: str  # the answer in words
    candidate: str  # NAME/VERSION that the answer is about: the cheapest that is as good, or the one that comes closest
    next_steps: tuple[str, ...]  # what would settle a verdict that is not settled
    not_measured: tuple[str, ...]
    teacher: str  # NAME/VERSION, folder or endpoint
    teacher_digest: str
    teacher_engine: Engine | Literal["endpoint"]
    requested_tasks: tuple[str, ...]  # the tasks that the user named; empty: those that were scored
    margins: dict[str, float]  # by task, in the metric's own units
    default_margins: bool
    candidates: tuple[Candidate, ...]  # as good, then not settled, then worse; each cheapest first
    left_out: dict[str, str]  # NAME/VERSION -> why it is not a candidate
    other_tasks: tuple[str, ...]  # other tasks that versions are scored on
    tokens_per_day: float | None
    tasks_digest: str
    prompts_digest: str
    harness: str
    created: datetime
