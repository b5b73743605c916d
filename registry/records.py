"""The records: what Limbeck knows of a version, and what MLflow keeps. Frozen pydantic models."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python

from limbeck.registry.core.digest import json_digest

Kind = Literal["teacher", "student", "onnx"]
Engine = Literal["torch", "onnxruntime", "endpoint"]  # endpoint: its files say where it is
Outcome = Literal["pass", "fail", "inconclusive"]


class Frozen(BaseModel):
    """Cannot be changed; unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Record(Frozen):
    """A frozen record with a digest of its fields."""

    def digest(self) -> str:
        """Hex SHA-256 of the record's JSON; fields that are `later` and say nothing are left out."""
        return json_digest(digest_content(self))


def field_added_later(default: Any) -> Any:
    """A field added to a record after some were kept: at its default it is no part of the digest."""
    return Field(default=default, json_schema_extra={"later": True})


def digest_content(value: Any) -> Any:
    """A value as its digest takes it: JSON, without what `later` fields do not say."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        silent = {n for n, f in fields.items() if f.json_schema_extra and getattr(value, n) == f.default}
        return {name: digest_content(inner) for name, inner in value if name not in silent}
    if isinstance(value, dict):
        return {key: digest_content(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [digest_content(inner) for inner in value]
    return to_jsonable_python(value)


class Version(Frozen):
    """One exact artifact under a registered model name."""

    name: str
    version: int
    kind: Kind
    digest: str  # limbeck.registry.core.digest.folder_digest of its files
    source: str  # MLflow artifact URI of the folder
    created: datetime
    engine: Engine = "torch"
    precision: str = "fp32"
    parent: str | None = None  # NAME/VERSION it was made from
    teacher: str | None = None  # NAME/VERSION it was distilled from
    recipe: str | None = None  # the recipe's label for it, such as "small" or "small-labels"
    recipe_digest: str | None = None
    family: str | None = None  # digest of what a student and its controls share: start, text, training, seed
    control: str | None = None  # of distillation: "labels", "labels_equal_cost" or "untrained"
    data_digest: str | None = None
    code_version: str | None = None
    licence: str | None = None
    # Of a student: whether the licence of what it learnt from lets a model learn from it; text alone always does.
    licence_allows_distillation: bool | None = None
    # What it came from, as far as it was told; an ONNX variant's are its student's.
    teacher_licence: str | None = None
    data_licence: str | None = None  # of the training text
    code_licence: str | None = None  # of the code that made it
    base_model: str | None = None  # of a student that began pretrained: NAME/VERSION, hub id or folder of that model
    base_model_digest: str | None = None
    base_model_licence: str | None = None
    author: str | None = None  # who registered it, see limbeck.registry.mlflow.identity
    params: int | None = None
    run_id: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """`NAME/VERSION`."""
        return f"{self.name}/{self.version}"


class Estimate(Record):
    """A number with its interval."""

    value: float
    low: float
    high: float
    confidence: float = 0.95
    degrees_of_freedom: float | None = field_added_later(
        None
    )  # degrees of freedom of Student's t, where the interval is by it


class TaskResult(Record):
    """One metric of one lm-eval task for one artifact."""

    metric: str
    value: float
    stderr: float | None  # clustered by document group where the task names one
    higher_is_better: bool
    documents: int
    chance: float | None = None  # the metric's value for guessing; None where it has no meaning
    task_hash: str  # of the task's configuration and documents
    prompt_hash: str  # of all the rendered prompts, in order
    group: str | None = None  # the group it is a sub-task of


def top_level_tasks(tasks: Mapping[str, TaskResult]) -> list[str]:
    """The tasks that belong to no group that is scored too."""
    return [name for name, result in tasks.items() if result.group not in tasks]


class BatchCost(Record):
    """Requests of one batch size, all of them the same."""

    batch: int
    request_ms: tuple[float, ...]  # one batch from start to end, round by round; rounds of one run are paired
    prefill_tokens_per_s: float  # of the whole batch
    decode_tokens_per_s: float
    p50_ms: float
    p95_ms: float
    usd_per_million_tokens: float
    peak_rss_bytes: int  # so far: smaller batches came before
    peak_device_bytes: int | None = None  # the most that torch held on the GPU


class Cost(Record):
    """What running an artifact costs, by the protocol of `limbeck.evals.cost.measure`, in a process of its own.

    Records of the first protocol lack what `later` marks.
    """

    params: int
    disk_bytes: int
    peak_rss_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    p50_ms: float  # one whole request: prompt_tokens in, new_tokens out, batch 1
    p95_ms: float
    usd_per_million_tokens: float  # prompt and new tokens together, at usd_per_hour
    usd_per_hour: float
    prompt_tokens: int
    new_tokens: int
    requests: int
    threads: int
    machine: str
    protocol: int = field_added_later(1)
    run: str | None = field_added_later(None)  # costs of one run were measured in turn, round by round
    device: str = field_added_later("cpu")  # cpu or cuda
    price: str | None = field_added_later(None)  # where usd_per_hour comes from: name, date and source
    usd_interval: Estimate | None = field_added_later(None)  # of usd_per_million_tokens: the median over rounds
    p50_interval: Estimate | None = field_added_later(None)  # of p50_ms
    flops_per_token: float | None = field_added_later(
        None
    )  # mean over a request's tokens, see limbeck.evals.cost.flops
    peak_device_bytes: int | None = field_added_later(None)
    loads: tuple[BatchCost, ...] = field_added_later(())  # by batch size, batch 1 first

    @property
    def setting(self) -> tuple[str, int, int, int, float, int]:
        """What two costs share that may stand in one table: machine, threads, request, price, protocol."""
        hardware = self.machine.partition(";")[0]
        return hardware, self.threads, self.prompt_tokens, self.new_tokens, self.usd_per_hour, self.protocol


class Relative(Record):
    """A scorecard relative to a teacher's, paired by document."""

    teacher: str  # NAME/VERSION or folder
    teacher_digest: str
    retention: Estimate | None  # mean over tasks; 1 is the teacher's quality; None: the teacher only guesses
    task_retention: dict[str, Estimate]
    difference: dict[str, Estimate]  # student - teacher, in the metric's own units
    cost_ratio: float | None  # usd_per_million_tokens over the teacher's: the median over paired rounds
    speedup: float | None  # teacher's p50_ms over this p50_ms, likewise
    cost_ratio_interval: Estimate | None = field_added_later(None)
    speedup_interval: Estimate | None = field_added_later(None)
    teacher_cost: Cost | None = field_added_later(None)  # of the same run as this scorecard's cost


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


class Overlap(Record):
    """How many of a task's documents occur in a training text."""

    documents: int
    contaminated: int  # those of which some n-gram occurs

    @property
    def share(self) -> float:
        return self.contaminated / self.documents if self.documents else 0.0


class Contamination(Record):
    """The overlap of a version's training text with the tasks it was scored on, see evals.tasks.contamination."""

    data_digest: str  # of the training text
    ngram: int  # words; a document that is shorter counts with all of its words
    tasks: dict[str, Overlap]  # no groups


class Scorecard(Record):
    """One artifact, one set of tasks, one machine."""

    artifact: str  # digest of the artifact's files
    model: str  # NAME/VERSION or folder
    tasks: dict[str, TaskResult]
    tasks_digest: str  # over every task_hash
    prompts_digest: str  # over every prompt_hash
    harness: str  # such as "lm-eval 0.4.13"
    created: datetime
    cost: Cost | None = None
    relative: Relative | None = None
    seconds: float | None = field_added_later(None)  # that scoring took; what was known already took none
    contamination: Contamination | None = field_added_later(None)  # None: the training text was not at hand


class TrainingCost(Record):
    """What making a student took."""

    training_seconds: float  # of all parts of a run that was stopped and resumed; online teacher included
    teacher_seconds: float = 0.0  # of the teacher's forward passes whose logits were stored and learnt from
    students_sharing_teacher: int = 1  # students of the recipe that share those logits; the seconds are not divided
    tokens: int  # seen in training
    machine: str  # limbeck.registry.core.machine.describe_hardware
    device: str = "cpu"
    api_input_tokens: int = 0  # sent to and got from a teacher behind an API
    api_output_tokens: int = 0
    api_model: str | None = None
    api_usd: float | None = field_added_later(None)  # what those cost at the recipe's prices; None where it named none


class Parity(Record):
    """An ONNX variant held against the PyTorch model it came from, on held-out tokens."""

    reference: str  # digest of the PyTorch artifact
    precision: str
    tokens: int
    max_logprob_diff: float  # largest absolute difference over all tokens and vocabulary entries
    mean_kl: float  # nats per token, KL(PyTorch || ONNX)
    top1_agreement: float
    bits_per_byte_reference: float
    bits_per_byte: float
    greedy_identical: bool
    passed: bool  # fp32: all differences <= 1e-3 and greedy_identical; others: nothing is broken outright
    p99_kl: float | None = field_added_later(None)  # 99th percentile over tokens
    max_kl: float | None = field_added_later(None)
    # A text alone beside the same text ...: largest difference in log-probability, and mean KL in nats per token
    batch_diff: float | None = field_added_later(None)  # in a batch with others
    batch_kl: float | None = field_added_later(None)
    left_padding_diff: float | None = field_added_later(None)  # in a batch padded on the left, its end token by token
    left_padding_kl: float | None = field_added_later(None)
    cache_diff: float | None = field_added_later(None)  # token by token with the runtime's cache
    cache_kl: float | None = field_added_later(None)


class RuleResult(Record):
    """One rule of a policy applied to one scorecard."""

    rule: str  # such as "quality.min_retention"
    outcome: Outcome
    message: str  # with the numbers


class Verdict(Record):
    """A policy applied to a scorecard, bound to the exact artifact, tasks and prompts."""

    outcome: Outcome
    rules: tuple[RuleResult, ...]
    model: str
    artifact: str
    tasks_digest: str
    prompts_digest: str
    scorecard: str  # digest of the scorecard
    policy: str  # digest of the policy
    created: datetime

    @property
    def content_digest(self) -> str:
        """The digest of all but the time: the same for two verdicts that say the same."""
        return json_digest({name: value for name, value in digest_content(self).items() if name != "created"})


class Request(Record):
    """Somebody asks that an alias may point at a version."""

    name: str
    alias: str
    version: int
    artifact: str  # digest of the version's files
    who: str
    when: datetime
    reason: str


class Approval(Record):
    """An answer to a request."""

    request: str  # digest of the request
    artifact: str  # digest of the version's files, as the approver saw them
    verdict: str | None  # digest of the verdict that the approver saw
    answer: Literal["approve", "reject"]
    who: str
    when: datetime
    reason: str
    key: str | None = field_added_later(None)  # public ed25519 key of the approver, base64; None: not signed
    signature: str | None = field_added_later(None)  # over the digest of all other fields, base64


class LedgerEntry(Record):
    """An alias moved; each entry carries the hash of the one before."""

    sequence: int
    when: datetime
    who: str
    name: str
    alias: str
    # adopt: moved through MLflow itself, and taken over; protect: the alias stays, its policy changes
    action: Literal["promote", "rollback", "adopt", "protect"]
    from_version: int | None
    to_version: int | None  # None: the alias was taken away (a rollback of the first promotion)
    artifact: str | None  # digest of the artifact it now points at
    verdict: str | None  # digest of the verdict
    reason: str
    previous: str  # hash of the entry before; "" for the first
    hash: str  # over all the other fields but key and signature
    override: bool = field_added_later(
        False
    )  # the verdict did not pass: somebody with the permission moved it all the same
    overridden_rules: tuple[str, ...] = field_added_later(
        ()
    )  # the rules that an override went over, with their numbers
    policy: str | None = field_added_later(None)  # digest of the policy
    approvals: tuple[str, ...] = field_added_later(())  # digests of the approvals
    sbom: str | None = field_added_later(None)  # digest of the bill of materials of the artifact
    anchor: str | None = field_added_later(None)  # the MLflow run that holds the ledger in place
    adopted: tuple[str, ...] = field_added_later(
        ()
    )  # of an adopt entry: the problems that it takes as they are, see limbeck.registry.ledger.chain
    key: str | None = field_added_later(None)  # public ed25519 key of who wrote it, base64; None: not signed
    signature: str | None = field_added_later(None)  # over the hash, base64


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
    # {params, disk_bytes, peak_rss_bytes, prefill_tokens_per_s, decode_tokens_per_s, p50_ms, p95_ms,
    # usd_per_million_tokens, flops_per_token}, each as in Cost
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
