"""What an artifact scored: task by task, relative to its teacher, with its parity and contamination."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from limbeck.registry.records.base import Estimate, Record
from limbeck.registry.records.cost import Cost


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


class Relative(Record):
    """A scorecard relative to a teacher's, paired by document."""

    teacher: str  # NAME/VERSION or folder
    teacher_digest: str
    retention: Estimate | None  # mean over tasks; 1 is the teacher's quality; None: the teacher only guesses
    task_retention: dict[str, Estimate]
    difference: dict[str, Estimate]  # student - teacher, in the metric's own units
    cost_ratio: float | None  # usd_per_million_tokens over the teacher's: the median over paired rounds
    speedup: float | None  # teacher's p50_ms over this p50_ms, likewise
    cost_ratio_interval: Estimate | None = None
    speedup_interval: Estimate | None = None
    teacher_cost: Cost | None = None  # of the same run as this scorecard's cost


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
    seconds: float | None = None  # that scoring took; what was known already took none
    contamination: Contamination | None = None  # None: the training text was not at hand


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
    passed: bool  # fp32: all differences <= 1e-3 and greedy_identical; others: nothing is broken outright
    p99_kl: float  # 99th percentile over tokens
    max_kl: float
    # The same text alone and ...: largest difference in log-probability, and mean KL in nats per token
    batch_diff: float  # in a batch with others
    batch_kl: float
    left_padding_diff: float  # in a batch padded on the left, its last tokens one by one with the cache
    left_padding_kl: float
    cache_diff: float  # token by token with the runtime's cache
    cache_kl: float
