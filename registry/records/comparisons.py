"""Two versions compared document by document, and the rows of a leaderboard."""

from __future__ import annotations

from typing import Literal

from limbeck.registry.records.base import Estimate, Kind, Outcome, Record


class Noninferiority(Record):
    """Whether a candidate is as good as a reference: a one-sided test at a margin set beforehand.

    The candidate's advantage is its mean difference, turned so that more is better. Alone, a test passes where
    the lower bound of the advantage is above -margin, fails where the upper bound is below, and else is
    inconclusive. The verdict passes where Holm's correction over tasks and candidates leaves that standing.
    """

    margin: float  # above 0, in the metric's own units
    lower: float  # of the advantage; one-sided, 95%
    upper: float  # likewise
    p_value: float  # of the hypothesis that the candidate is worse by the margin or more
    p_holm: float  # corrected for all that was tested
    uncorrected: Outcome  # of this test alone
    verdict: Outcome
    detectable: float  # the smallest margin that these documents show with 80% power, were there no difference
    # Inconclusive: about how many documents would settle it with 80% power, and clusters of them, if the
    # difference stays what it is; None where none would, since it is at the margin itself.
    documents_needed: int | None = None
    clusters_needed: int | None = None


class AnswerDifferences(Record):
    """How two models' answers differ: a diagnosis, no test of being as good. None where it cannot be told."""

    right_to_wrong: int | None  # documents that the reference has right and the candidate wrong; 0/1 scores only
    wrong_to_right: int | None
    mcnemar_p: float | None  # exact, two-sided; takes documents as independent
    kl: float | None  # KL(reference || candidate) of the choices' probabilities, mean over documents, nats


class ComparedTask(Record):
    """One task, or several of one metric together, of a candidate held against a reference."""

    task: str  # a task's or group's name; else "macro" or "pooled"
    tasks: tuple[str, ...]  # that it is made of
    metric: str
    higher_is_better: bool
    documents: int
    clusters: int
    candidate: float
    reference: float
    difference: Estimate  # candidate - reference in the metric's own units; paired by document, clustered
    stderr: float  # of the difference
    better: str | None  # the model that is better beyond the interval of the difference
    retention: Estimate | None  # of what the reference has above chance
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
    """`limbeck compare CANDIDATE REFERENCE --format json`. Stable: fields are only ever added."""

    candidate: str  # NAME/VERSION or folder
    reference: str
    candidate_digest: str
    reference_digest: str
    harness: str
    retention: Estimate | None  # mean over the tasks that have one
    tasks: tuple[ComparedTask, ...]  # top-level tasks and groups
    over_all: tuple[ComparedTask, ...]  # of each metric that several tasks have: macro, then pooled
    unknown_tasks: dict[str, str]  # tasks of which nothing can be told, and why
    flips: tuple[Flip, ...]  # where they were asked for


class ControlTaskResult(Record):
    """A student less its control on one task, paired by document."""

    metric: str
    difference: Estimate
    better: Literal["student", "control"] | None  # beyond the interval; None: not settled


class ControlComparison(Record):
    """A distilled student held against a control: the same student without the teacher."""

    student: str  # NAME/VERSION
    control: str
    kind: str  # labels (at equal tokens), labels_equal_cost, untrained
    tasks: dict[str, ControlTaskResult]  # top-level tasks and groups
    outcome: Literal["better", "worse", "mixed", "not settled"]  # over the tasks
    student_tokens: int | None  # that each has seen in training
    control_tokens: int | None
    student_seconds: float | None  # of training and of the teacher's pass, in full
    control_seconds: float | None


class LeaderboardRow(Record):
    """One row of `limbeck leaderboard NAME --format json`.

    Rows of one `setting` are alike in tasks, prompts, harness, teacher and how costs were measured; only these are
    ranked against each other. The largest setting comes first, in it the best retention; unscored versions last.
    Stable: fields are only ever added. What was not measured is null, and its keys are there all the same.
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
    # usd_per_million_tokens, p50_ms, cost_ratio, speedup -> {low, high}, where the rounds of a run gave one
    intervals: dict[str, dict[str, float]] = {}
    machine: str | None = None  # that the cost was measured on
    setting: int | None = None  # 0 is the largest; null: not scored
    differs: str | None = None  # how the setting differs from setting 0, in words
    control: str | None = None  # of distillation, as Version.control
    against_controls: tuple[ControlComparison, ...] = ()  # of a distilled PyTorch student
    # {model, teacher, data, code, base_model}, each an SPDX expression as far as it is stated
    licences: dict[str, str | None] = {}
    licence_allows_distillation: bool | None = None  # as Version's
