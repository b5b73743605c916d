"""The gate's policy: what a version must show, and who has to agree, before an alias may point at it.

A policy is a TOML file. Each rule is optional, and one that is left out is not asked; a policy that asks nothing is
refused. `limbeck policy check policy.toml` says in words what one asks.

    [quality]
    min_retention = 0.95        # share of the teacher's quality that is kept, mean over the tasks; 1 is all of it
    confidence = 0.95           # the default: of the intervals that these rules are held against
    tasks = ["stdlib_next_line"]  # tasks that have to be in the scorecard
    min_documents = 200         # of each task
    max_age_days = 30           # since it was scored

    [quality.min_task_retention]  # the same as min_retention, for one task
    stdlib_next_line = 0.9

    [quality.margin]            # how much worse than the teacher it may be, in the metric's own units:
    acc = 0.02                  # on each task of this metric,
    stdlib_next_line = 0.01     # or on this task

    [cost]
    max_cost_ratio = 0.5        # dollars per million tokens over the teacher's
    max_usd_per_million_tokens = 0.02
    max_p50_ms = 100            # one request of the cost protocol, start to end
    max_p95_ms = 200
    max_disk_bytes = 50_000_000
    max_peak_rss_bytes = 500_000_000
    max_peak_device_bytes = 2_000_000_000  # of a GPU's memory
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

    [licence]                   # the licences that are allowed, however they are spelt
    teacher = ["apache-2.0", "mit"]
    base_model = ["apache-2.0", "mit"]  # of the pretrained model that a student began as
    data = ["psf-2.0", "cc-by-4.0"]
    code = ["apache-2.0"]

    [approvals]
    needed = 1                  # so many people, neither the version's author nor who asked for it
    people = ["ann", "bob"]     # of these; without it, of anybody

    [approvals.keys]            # with it, an approval counts where it is signed by the key of whoever gave it
    ann = "GjTVLSn2Jyqg0uNHzrw7qgZdCzZfFtg8nLUkA7vMLRg="

    [override]
    people = ["carol"]          # who may promote what does not pass; without it nobody may

    [rules.toxicity]            # a rule in Python, see limbeck.registry.policy.plugins; its options
    max_share = 0.01

A limit of quality is held against an interval: that of the scorecard, at `confidence`, both ends counted. An interval
wholly on the wrong side fails; one that reaches across the limit is inconclusive, and the verdict says about how many
documents settle it. So `confidence = 0.9` is the one-sided test at 95% of `limbeck compare`. A margin is a test of
non-inferiority: the lower end of student - teacher, turned so that more is better, has to lie above minus the margin.
Costs are held against the upper end of their interval where the rounds gave one, else against the number measured.

What is not known, such as an overlap with text that is not at hand, or a licence, is inconclusive. Neither failing
nor inconclusive passes the gate.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, create_model

from limbeck.registry.records import FIGURES, Cost, Frozen, Record, limit_name

Retention = Annotated[float, Field(ge=0, le=1.5)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]


class QualityRules(Frozen):
    """How much of the teacher's quality has to be kept."""

    min_retention: Retention | None = None
    tasks: tuple[Name, ...] = ()
    min_documents: int | None = Field(default=None, ge=1)
    min_task_retention: dict[str, Retention] = {}
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    margin: dict[str, Positive] = {}
    max_age_days: Positive | None = None


def _cost_limit_fields() -> dict[str, Any]:
    """A key for each figure of `limbeck.registry.records.FIGURES`: max_..., or min_... if more is better."""
    whole = {name for name, field in Cost.model_fields.items() if field.annotation in (int, int | None)}
    kinds = {name: PositiveInt if name in whole else Positive for name in FIGURES}
    return {limit_name(name): (kind | None, None) for name, kind in kinds.items()}


class CostLimits(create_model("CostFigureLimits", __base__=Frozen, **_cost_limit_fields())):  # type: ignore[misc]
    """How much it may cost to run: a limit for each cost figure, and one on its ratio to the teacher's cost."""

    max_cost_ratio: Positive | None = None


class ParityLimits(Frozen):
    """How close an ONNX variant has to be to its PyTorch model."""

    required: bool = True
    max_mean_kl: float | None = Field(default=None, ge=0)
    min_top1_agreement: float | None = Field(default=None, ge=0, le=1)
    max_p99_kl: NonNegative | None = None
    max_bits_per_byte_increase: NonNegative | None = None


class LineageRules(Frozen):
    """What it may have been made from."""

    max_contamination: float | None = Field(default=None, ge=0, le=1)
    require_distillation_licence: bool = False


class LicenceRules(Frozen):
    """The licences that are allowed; None: not asked."""

    teacher: tuple[Name, ...] | None = None
    base_model: tuple[Name, ...] | None = None  # the pretrained model that a student began as
    data: tuple[Name, ...] | None = None  # of the training text
    code: tuple[Name, ...] | None = None  # of the code that made it


class ApprovalRules(Frozen):
    """Who has to agree."""

    needed: int = Field(default=0, ge=0)
    people: tuple[Name, ...] = ()  # empty: anybody
    keys: dict[str, str] = {}  # name -> public key of ed25519, base64; empty: approvals need no signature


class OverrideRules(Frozen):
    """Who may go over the gate's veto."""

    people: tuple[Name, ...] = ()


class Policy(Record):
    """The rules of one gate."""

    quality: QualityRules = QualityRules()
    cost: CostLimits = CostLimits()
    parity: ParityLimits = ParityLimits()
    lineage: LineageRules = LineageRules()
    licence: LicenceRules = LicenceRules()
    approvals: ApprovalRules = ApprovalRules()
    override: OverrideRules = OverrideRules()
    rules: dict[str, dict[str, Any]] = {}  # of `limbeck.registry.policy.plugins`: name -> options
