"""The records of a verdict: its answer, the candidates and what is open about them."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from limbeck.evals.cost.payback import Payback
from limbeck.registry.records import ComparedTask, Cost, Engine, Estimate, Frozen, Kind, Outcome, TrainingCost

VerdictAnswer = Literal["yes", "no", "not settled"]


class OpenTask(Frozen):
    """A task that a candidate does not pass: what would settle it, if the difference stays what it is."""

    task: str
    documents: int | None  # about so many; None: no number would, since the difference is at the margin itself
    as_good: bool  # what they would show: that it is as good, or that it is worse
    margin: float  # above this one it passes, corrected for all tests


class Candidate(Frozen):
    """A version held against the teacher: is it as good, and is it cheaper?"""

    version: str  # NAME/VERSION
    files: str  # their digest
    kind: Kind
    engine: Engine
    precision: str
    recipe: str | None
    is_teacher: bool  # the teacher itself in another form: exported, quantized
    scorecard: str  # digest
    quality: Outcome  # pass: as good on every task; fail: worse by more than the margin on one, surely
    cheaper: bool | None  # surely so, or surely not; None: not known
    retention: Estimate | None  # mean over the tasks that have one
    tasks: tuple[ComparedTask, ...]
    open: tuple[OpenTask, ...]  # of the tasks that are inconclusive
    unknown_tasks: dict[str, str]  # task -> why nothing can be told of it
    cost: Cost | None
    teacher_cost: Cost | None  # of the same run, where there is one
    cost_ratio: float | None
    cost_ratio_interval: Estimate | None
    speedup: float | None
    speedup_interval: Estimate | None
    making: TrainingCost | None
    payback: Payback | None


class VerdictReport(Frozen):
    """`limbeck verdict NAME --format json`. Stable: fields are only ever added. What is not known is null."""

    name: str
    answer: VerdictAnswer
    sentence: str  # the answer in words
    candidate: str  # NAME/VERSION that it is about: the cheapest that is as good, else the one that comes closest
    settle: tuple[str, ...]  # not settled: what would settle it
    not_measured: tuple[str, ...]
    teacher: str  # NAME/VERSION, folder or endpoint
    teacher_digest: str
    teacher_engine: Engine | Literal["endpoint"]
    asked: tuple[str, ...]  # the tasks that it was asked to judge by; empty: those that were scored
    margins: dict[str, float]  # by task that it is judged by, in the metric's own units
    default_margins: bool
    tests: int  # that the correction is over
    candidates: tuple[Candidate, ...]  # as good, not settled, worse; each cheapest first
    left_out: dict[str, str]  # NAME/VERSION -> why it is no candidate
    other_tasks: tuple[str, ...]  # that versions are scored on, too
    tokens_per_day: float | None
    tasks_digest: str
    prompts_digest: str
    harness: str
    created: datetime
