"""The records: what Limbeck knows of a version, and what MLflow keeps. Frozen pydantic models."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from registry.digest import json_digest

Kind = Literal["teacher", "student", "onnx"]
Engine = Literal["torch", "onnxruntime"]
Outcome = Literal["pass", "fail", "inconclusive"]


class Frozen(BaseModel):
    """Cannot be changed; unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Record(Frozen):
    """A frozen record with a digest of its fields."""

    def digest(self) -> str:
        """Hex SHA-256 of the record's JSON."""
        return json_digest(self.model_dump(mode="json"))


class Version(Frozen):
    """One exact artifact under a registered model name."""

    name: str
    version: int
    kind: Kind
    digest: str  # registry.digest.folder_digest of its files
    source: str  # MLflow artifact URI of the folder
    created: datetime
    engine: Engine = "torch"
    precision: str = "fp32"
    parent: str | None = None  # NAME/VERSION it was made from
    teacher: str | None = None  # NAME/VERSION it was distilled from
    recipe: str | None = None  # the recipe's label for it, such as "small" or "small-labels"
    recipe_digest: str | None = None
    data_digest: str | None = None
    code_version: str | None = None
    licence: str | None = None
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


class Cost(Record):
    """What running an artifact costs, measured in a process of its own."""

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


class Relative(Record):
    """A scorecard relative to a teacher's, paired by document."""

    teacher: str  # NAME/VERSION or folder
    teacher_digest: str
    retention: Estimate | None  # mean over tasks; 1 is the teacher's quality; None: the teacher only guesses
    task_retention: dict[str, Estimate]
    difference: dict[str, Estimate]  # student - teacher, in the metric's own units
    cost_ratio: float | None  # usd_per_million_tokens over the teacher's
    speedup: float | None  # teacher's p50_ms over this p50_ms


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
    passed: bool  # fp32: max_logprob_diff <= 1e-3 and greedy_identical; others are reported, not limited


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


class LedgerEntry(Record):
    """An alias moved; each entry carries the hash of the one before."""

    sequence: int
    when: datetime
    who: str
    name: str
    alias: str
    action: Literal["promote", "rollback", "adopt"]  # adopt: moved through MLflow itself, and taken over
    from_version: int | None
    to_version: int | None  # None: the alias was taken away (a rollback of the first promotion)
    artifact: str | None  # digest of the artifact it now points at
    verdict: str | None  # digest of the verdict
    reason: str
    previous: str  # hash of the entry before; "" for the first
    hash: str  # over all the other fields


class LeaderboardRow(Record):
    """One row of `limbeck leaderboard NAME --format json`, best retention first; unscored versions come last.

    Stable: fields are only ever added. What was not measured is null, and its keys are there all the same.
    """

    version: str  # NAME/VERSION
    kind: Kind
    parent: str | None  # NAME/VERSION it was made from: an ONNX variant's student, a student's teacher
    recipe: str | None  # the recipe's label
    precision: str
    quality: dict[str, dict[str, float | str | None]]  # task or group -> {metric, value, stderr}
    retention: dict[str, float] | None  # {value, low, high}: share of the teacher's quality, 95% interval
    # {params, disk_bytes, peak_rss_bytes, prefill_tokens_per_s, decode_tokens_per_s, p50_ms, p95_ms,
    # usd_per_million_tokens}, each as in Cost
    cost: dict[str, int | float] | None
    cost_ratio: float | None  # usd_per_million_tokens over the teacher's
    speedup: float | None  # the teacher's p50_ms over this one's
    pareto: bool  # no other row is both cheaper and at least as good
    verdict: Outcome | None  # of the newest verdict
    aliases: tuple[str, ...]
