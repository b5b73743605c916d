"""Scorecards: the results of an artifact by task and relative to its teacher; contamination and parity."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from limbeck.registry.records.base import Estimate, Record
from limbeck.registry.records.cost import Cost


class TaskResult(Record):
    """One metric of one lm-eval task for one artifact."""

    metric: str
    filter: str = "none"  # of lm-eval, applied to the answers before the metric
    value: float
    stderr: float | None  # clustered by document group if the task names one
    higher_is_better: bool
    documents: int
    of_documents: int | None = None  # that the task has; more than `documents` for a subset
    limit_seed: int | None = None  # of the random sample; None: all documents, or picked ones
    clusters: int | None = None  # of documents that belong together; the error is that of so many
    repeats: int = 0  # documents that repeat another, in the same words or nearly the same
    chance: float | None = None  # the metric's value that costs nothing; None if that has no meaning
    chance_source: str | None = None  # what has it: any of the choices, a constant answer, a compressor, metadata
    task_hash: str  # of the task's configuration and documents
    prompt_hash: str  # of all the rendered prompts, in order
    group: str | None = None  # the group it is a sub-task of

    @property
    def full_metric(self) -> str:
        """The metric, with its filter if it has one: "exact_match after strict-match"."""
        return self.metric if self.filter == "none" else f"{self.metric} after {self.filter}"


def top_level_tasks(tasks: Mapping[str, TaskResult]) -> list[str]:
    """The tasks that are not part of a group among these tasks."""
    return [name for name, result in tasks.items() if result.group not in tasks]


class Relative(Record):
    """A scorecard compared with the teacher's, paired by document."""

    teacher: str  # NAME/VERSION or folder
    teacher_digest: str
    retention: Estimate | None  # mean over tasks; 1 is the teacher's quality; None: the teacher only guesses
    task_retention: dict[str, Estimate]
    difference: dict[str, Estimate]  # student - teacher, in the metric's own units
    cost_ratio: float | None  # usd_per_million_tokens over the teacher's: the median over paired rounds
    speedup: float | None  # the teacher's p50_ms over this p50_ms, the median over paired rounds
    cost_ratio_interval: Estimate | None = None
    speedup_interval: Estimate | None = None
    teacher_cost: Cost | None = None  # measured in the same run as this scorecard's cost


class Overlap(Record):
    """The number of a task's documents that occur in a training text."""

    documents: int
    contaminated: int  # documents with at least one n-gram that occurs

    @property
    def share(self) -> float:
        """The share of contaminated documents, 0 to 1."""
        return self.contaminated / self.documents if self.documents else 0.0


class Contamination(Record):
    """The overlap of a version's training text with its tasks, see limbeck.evals.tasks.contamination."""

    data_digest: str  # of the training text
    ngram: int  # words; a shorter document counts with all of its words
    tasks: dict[str, Overlap]  # without groups


class Scorecard(Record):
    """The scores of one artifact on one set of tasks, measured on one machine."""

    artifact: str  # digest of the artifact's files
    model: str  # NAME/VERSION or folder
    tasks: dict[str, TaskResult]
    tasks_digest: str  # over every task_hash
    prompts_digest: str  # over every prompt_hash
    harness: str  # such as "lm-eval 0.4.13"
    created: datetime
    cost: Cost | None = None
    relative: Relative | None = None
    seconds: float | None = None  # of scoring; results that were cached took none
    contamination: Contamination | None = None  # None: the training text was not on this machine


class Parity(Record):
    """An ONNX variant compared with its PyTorch model on held-out tokens."""

    reference: str  # digest of the PyTorch artifact
    precision: str
    tokens: int
    max_logprob_diff: float  # largest absolute difference over all tokens and vocabulary entries
    mean_kl: float  # nats per token, KL(PyTorch || ONNX)
    top1_agreement: float
    bits_per_byte_reference: float
    bits_per_byte: float
    greedy_identical: bool
    # fp32: all differences <= 1e-3 and greedy_identical; others: within `limits`, or kept under `max_change`
    passed: bool
    p99_kl: float  # 99th percentile over tokens
    max_kl: float
    documents: int = 0  # conversations included
    conversations: int = 0  # rendered by the chat template
    # With intervals over documents: "bits_per_byte_change" (relative), "mean_kl", "p99_kl", "top1_agreement"
    quality: dict[str, Estimate] = {}
    limits: dict[str, float] = {}  # of these figures, for the precision; the interval has to be within them
    max_change: float | None = None  # the user's own limit of bits_per_byte_change, which decides instead of `limits`
    exceeded: tuple[str, ...] = ()  # the figures that are not within `limits`
    # The same text alone and ...: largest difference in log-probability, and mean KL in nats per token
    batch_diff: float  # in a batch with others
    batch_kl: float
    left_padding_diff: float  # in a batch padded on the left, its last tokens one by one with the cache
    left_padding_kl: float
    cache_diff: float  # token by token with the runtime's cache
    cache_kl: float
    # Against PyTorch, around each length at which the model changes its numbers, such as the end of a window
    lengths: tuple[int, ...] = ()  # in tokens; empty: it has none within its context
    lengths_not_reached: tuple[int, ...] = ()  # too long to compare
    long_diff: float = 0.0
    long_kl: float = 0.0
    # Parity cannot find a misread model, since both sides share the misreading. What the loader compared instead:
    reading: dict[str, str] = {}  # "rotary", "tokenizer", "weights" -> the result of the check against the files

    @property
    def is_above_limits(self) -> bool:
        """Whether it passed only because its user allowed more than Limbeck's limits."""
        return self.passed and bool(self.exceeded)

    def describe_limits(self) -> str:
        """Whether it is within the limits of its precision, in words."""
        if not self.limits:
            return "exact"
        if not self.exceeded:
            return "within Limbeck's limits"
        figures = ", ".join(name.replace("_", " ") for name in self.exceeded)
        if self.max_change is None:
            return f"above Limbeck's limits: {figures}"
        return f"above Limbeck's limits ({figures}), kept under --max-change {self.max_change:g}"

    def describe_lengths(self) -> str:
        """Up to which length the two were compared, in words."""
        parts = []
        if self.lengths:
            past = ", ".join(f"{length:,}" for length in self.lengths)
            parts.append(f"difference past {past} tokens: {self.long_diff:.2g}")
        if self.lengths_not_reached:
            parts.append(f"not compared past {self.lengths_not_reached[0]:,} tokens")
        return "; ".join(parts) or "no window or other length changes its numbers"

    def describe_reading(self) -> str:
        """What the loader compared with the checkpoint's files, in words."""
        return "; ".join(f"{part} {result}" for part, result in self.reading.items()) or "not checked"
