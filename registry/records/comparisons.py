"""Two versions compared document by document, and the rows of a leaderboard."""

from __future__ import annotations

from typing import Literal

from limbeck.registry.records.base import Estimate, Kind, Outcome, Record


class Noninferiority(Record):
    """Whether a candidate is as good as a reference: a one-sided test at a margin set beforehand.

    The candidate's advantage is its mean difference, with the sign by which more is better. A test passes if the
    lower bound of the advantage is above -margin, fails if the upper bound is below -margin, and is inconclusive
    otherwise. The verdict passes only if the test still passes after Holm's correction over candidates.
    """

    margin: float  # above 0, in the metric's own units
    lower: float  # of the advantage; one-sided, 95%
    upper: float  # of the advantage; one-sided, 95%
    p_value: float  # of the hypothesis that the candidate is worse by the margin or more
    p_holm: float  # the p-value after Holm's correction over candidates; `compare` has one
    uncorrected: Outcome  # of this test before the correction
    verdict: Outcome
    detectable: float  # the smallest margin that these documents show with 80% power if there is no difference
    # If inconclusive although the bound passes: the share of the difference's variance that three clusters carry.
    carried_by_few: float | None = None
    # If inconclusive: about how many documents, and clusters of them, would decide it with 80% power if the
    # difference stays the same; None if no number would, since the difference is at the margin.
    documents_needed: int | None = None
    clusters_needed: int | None = None


class AnswerDifferences(Record):
    """How the answers of two models differ: a diagnosis, not a test. A field is None if it cannot be computed."""

    right_to_wrong: int | None  # documents that the reference has right and the candidate wrong; 0/1 scores only
    wrong_to_right: int | None
    mcnemar_p: float | None  # exact, two-sided; treats documents as independent
    kl: float | None  # KL(reference || candidate) of the choices' probabilities, mean over documents, nats


class ComparedTask(Record):
    """A candidate compared with a reference on one task, or on several tasks of one metric together."""

    task: str  # a task's or group's name; else "macro" or "pooled"
    tasks: tuple[str, ...]  # the tasks in it
    metric: str
    higher_is_better: bool
    documents: int
    clusters: int
    candidate: float
    reference: float
    difference: Estimate  # candidate - reference in the metric's own units; paired by document, clustered
    stderr: float  # of the difference
    better: str | None  # the better model, if the interval of the difference excludes 0
    retention: Estimate | None  # of the reference's score above chance
    no_retention: str | None  # why it has none
    noninferiority: Noninferiority
    answers: AnswerDifferences


class Flip(Record):
    """A document on which two models differ."""

    task: str
    doc_id: int
    prompt_end: str | None
    target: str | None
    candidate_response: str | None
    reference_response: str | None
    candidate_value: float
    reference_value: float


class ComparedModels(Record):
    """`limbeck compare CANDIDATE REFERENCE --format json`. Stable: fields are only added."""

    candidate: str  # NAME/VERSION or folder
    reference: str
    candidate_digest: str
    reference_digest: str
    harness: str
    retention: Estimate | None  # mean over the tasks that have one
    tasks: tuple[ComparedTask, ...]  # top-level tasks and groups
    over_all: tuple[ComparedTask, ...]  # of each metric that several tasks have: macro, then pooled
    unknown_tasks: dict[str, str]  # tasks that cannot be compared, and why
    flips: tuple[Flip, ...]  # empty unless asked for


class ControlTaskResult(Record):
    """The difference of a student and its control on one task, paired by document."""

    metric: str
    difference: Estimate
    better: Literal["student", "control"] | None  # None: the interval of the difference includes 0


class ControlComparison(Record):
    """A distilled student compared with a control: the same student trained without the teacher."""

    student: str  # NAME/VERSION
    control: str
    kind: str  # labels (at equal tokens), labels_equal_cost, untrained
    tasks: dict[str, ControlTaskResult]  # top-level tasks and groups
    outcome: Literal["better", "worse", "mixed", "not settled"]  # over the tasks
    student_tokens: int | None  # seen in training
    control_tokens: int | None
    student_seconds: float | None  # of training and of the teacher's whole pass
    control_seconds: float | None


class LeaderboardRow(Record):
    """One row of `limbeck leaderboard NAME --format json`.

    Rows of one `setting` have equal tasks, prompts, harness, teacher and measurement of cost; only these are ranked
    against each other. The largest setting comes first, in it the best retention; unscored versions come last.
    Stable: fields are only added. Values that were not measured are null; their keys are always present.
    """

    version: str  # NAME/VERSION
    kind: Kind
    parent: str | None  # NAME/VERSION it was made from: an ONNX variant's student, a student's teacher
    recipe: str | None  # the recipe's label
    precision: str
    # task or group -> {metric, value, stderr, higher_is_better}
    quality: dict[str, dict[str, bool | float | str | None]]
    retention: dict[str, float] | None  # {value, low, high}: share of the teacher's quality, 95% interval
    # every figure of `FIGURES`, as in Cost
    cost: dict[str, int | float | None] | None
    cost_ratio: float | None  # usd_per_million_tokens over the teacher's
    speedup: float | None  # the teacher's p50_ms over this one's
    pareto: bool  # no other row shown of its setting is both cheaper and at least as good
    verdict: Outcome | None  # of the newest verdict
    aliases: tuple[str, ...]
    task_retention: dict[str, dict[str, float]] = {}  # task or group -> as retention
    # usd_per_million_tokens, p50_ms, cost_ratio, speedup -> {low, high}, if measured in several rounds
    intervals: dict[str, dict[str, float]] = {}
    machine: str | None = None  # on which the cost was measured
    setting: int | None = None  # 0 is the largest; null: not scored
    differs: str | None = None  # the difference of its setting from setting 0, in words
    control: str | None = None  # of distillation, as Version.control
    against_controls: tuple[ControlComparison, ...] = ()  # of a distilled PyTorch student
    # {model, teacher, data, code, base_model}: SPDX expressions; null if unknown
    licences: dict[str, str | None] = {}
    licence_allows_distillation: bool | None = None  # as Version's
