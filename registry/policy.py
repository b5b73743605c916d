"""The gate's rules: what a version's scorecard and parity must show before an alias may point at it.

A policy is a TOML file. Only `quality.min_retention` has to be there; a rule left out is not asked.

    [quality]
    min_retention = 0.95        # the LOWER end of retention's interval reaches it; 1 is the teacher's quality
    tasks = ["stdlib_next_line"]  # tasks that have to be in the scorecard
    min_documents = 200         # of each task

    [quality.min_task_retention]  # the same as min_retention, for one task
    stdlib_next_line = 0.9

    [cost]
    max_cost_ratio = 0.5        # dollars per million tokens over the teacher's
    max_p95_ms = 200
    max_disk_bytes = 50_000_000
    max_peak_rss_bytes = 500_000_000
    min_decode_tokens_per_s = 100

    [parity]                    # asked of ONNX variants
    required = true             # the default; it passed when it was exported: fp32 equals PyTorch, no other is broken
    max_mean_kl = 0.05          # nats per token
    max_p99_kl = 0.5            # of 99 tokens in 100
    min_top1_agreement = 0.9
    max_bits_per_byte_increase = 0.02  # over its PyTorch model

    [lineage]
    max_contamination = 0.01    # of each task: the share of documents that occur in the training text
    require_distillation_licence = true  # the teacher's licence has to allow that a student learns from it

What is not known, such as an overlap with text that is not at hand, or a licence, is inconclusive.
An interval wholly below a limit fails. One that reaches across it is inconclusive: more documents settle it.
Neither passes the gate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from registry import tomlfile
from registry.records import Frozen, Record, later


class Quality(Frozen):
    """How much of the teacher's quality has to be kept."""

    min_retention: float = Field(ge=0, le=1.5)
    tasks: tuple[str, ...] = ()
    min_documents: int | None = Field(default=None, ge=1)
    min_task_retention: dict[str, float] = {}


class CostLimits(Frozen):
    """How much it may cost to run."""

    max_cost_ratio: float | None = Field(default=None, gt=0)
    max_p95_ms: float | None = Field(default=None, gt=0)
    max_disk_bytes: int | None = Field(default=None, gt=0)
    max_peak_rss_bytes: int | None = Field(default=None, gt=0)
    min_decode_tokens_per_s: float | None = Field(default=None, gt=0)


NotNegative = Annotated[float, Field(ge=0)]


class ParityLimits(Frozen):
    """How close an ONNX variant has to be to its PyTorch model."""

    required: bool = True
    max_mean_kl: float | None = Field(default=None, ge=0)
    min_top1_agreement: float | None = Field(default=None, ge=0, le=1)
    max_p99_kl: NotNegative | None = later(None)
    max_bits_per_byte_increase: NotNegative | None = later(None)


class LineageRules(Frozen):
    """What it may have been made from."""

    max_contamination: float | None = Field(default=None, ge=0, le=1)
    require_distillation_licence: bool = False


class ApprovalRules(Frozen):
    """Whose yes it needs."""

    needed: int = Field(default=0, ge=0)
    people: tuple[str, ...] = ()


class Override(Frozen):
    """Who may promote what does not pass."""

    people: tuple[str, ...] = ()


class Policy(Record):
    """The rules of one gate."""

    quality: Quality
    cost: CostLimits = CostLimits()
    parity: ParityLimits = ParityLimits()
    lineage: LineageRules = later(LineageRules())
    approvals: ApprovalRules = later(ApprovalRules())
    override: Override = later(Override())


def load(path: Path | str) -> Policy:
    """The policy in a TOML file. Raises BadInput with the line of what is wrong in it."""
    return tomlfile.load(path, Policy)
